"""What is masked in texts that leave the machine, and what is not."""

import pytest

from jobs.reporting.secrets import has_wandb_key, without_secrets

VALUE = "abcdefgh12345678"


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        *((name, True) for name in ("HF_TOKEN", "WANDB_API_KEY", "MYTOKEN", "DB_PASSWORD", "client_secret", "OPENAI_KEY")),
        *((name, False) for name in ("TOKENIZERS_PARALLELISM", "MAX_TOKENS", "HOME", "KEYBOARD", "AUTHOR", "MONKEY")),
    ],
)
def test_variables_that_are_called_like_secrets_are_masked(name, masked):
    assert without_secrets(f"a {VALUE} b", {name: VALUE}) == ("a (secret) b" if masked else f"a {VALUE} b")


def test_texts_are_masked_wherever_they_stand_and_longer_secrets_first():
    given = {"a": [VALUE, 3, None, {VALUE: (f"x{VALUE}y", True)}], "b": 2.5}
    environment = {"A_TOKEN": VALUE, "B_TOKEN": f"x{VALUE}", "SHORT_TOKEN": "x", "EMPTY_TOKEN": ""}
    assert without_secrets(given, environment) == {"a": ["(secret)", 3, None, {"(secret)": ("(secret)y", True)}], "b": 2.5}


def test_a_key_is_found_for_the_server_that_counts(tmp_path):
    file = tmp_path / "netrc"
    environment = {"NETRC": str(file)}
    assert not has_wandb_key(environment)
    file.write_text("machine wandb.example.org login user password x\n")
    assert not has_wandb_key(environment)
    assert has_wandb_key({**environment, "WANDB_BASE_URL": "https://wandb.example.org:8080"})
    assert has_wandb_key({**environment, "WANDB_API_KEY": "x"})
    file.write_text("no netrc at all")
    assert not has_wandb_key(environment)
