"""What stages leave on disk: files with digests, the keys that name a result, its place in the job folder, reading it again."""
