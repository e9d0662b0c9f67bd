"""The certificate: each exported format read back by its own client in a fresh process, and compared with our own reading.

Shapes: n windows, t tokens each, v the vocabulary, g generated tokens.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import DataError
from jobs.execution.memory import OUT_OF_MEMORY_WORDS
from jobs.execution.storage import FULL
from jobs.processes.environment import without_ranks
from jobs.results.artifacts import remove_folder

logger = logging.getLogger(__name__)

# Both sides hold the same float16-rounded values and compute in float32; what is left is the order of summation, which moves
# logits by about 1e-6 of their deviation. A wrong code or scale moves them by more than 1e-2.
LOGIT_TOLERANCE = 1e-3
# Two tokens whose logits are closer than twice the tolerance may trade places without either side being wrong.
TIE_MARGIN = 2 * LOGIT_TOLERANCE
NUM_WINDOWS, WINDOW_LENGTH = 4, 64
NO_CLIENT_EXIT = 3
_PROJECT_ROOT = Path(__file__).resolve().parents[2]

ClientCommand = Callable[[str, Path, Path, Path], Sequence[str]]


class Verdict(StrEnum):
    """What the client of a format says about it."""

    PASSED = "passed"
    FAILED = "failed"
    NO_CLIENT = "no client on this machine"


@dataclass(frozen=True, kw_only=True)
class FormatCertificate:
    """Verdict on one format. Differences and margins are fractions of the standard deviation of our logits."""

    format: str
    verdict: Verdict
    reason: str
    max_logit_difference: float | None = None
    logit_tolerance: float = LOGIT_TOLERANCE
    greedy_tokens: int = 0
    greedy_ties: int = 0
    tie_margin: float = TIE_MARGIN
    windows: int = 0
    window_length: int = 0


def client_command(name: str, directory: Path, tokens: Path, out: Path) -> Sequence[str]:
    """The command that runs the client of a format: it reads ``tokens`` and writes logits and a greedy continuation."""
    return [sys.executable, "-m", "algorithms.formats.client", name, str(directory), str(tokens), str(out)]


def certificate_windows(sequences: Sequence[Tensor], vocab_size: int) -> Tensor:
    """Up to 4 windows of up to 64 tokens, [n, t] int64: the heads of the first sequences, seeded random ids without any."""
    usable = [sequence.flatten() for sequence in sequences[:NUM_WINDOWS] if sequence.numel() > 1]
    if not usable:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (NUM_WINDOWS, WINDOW_LENGTH), generator=generator)
    length = min(WINDOW_LENGTH, *(sequence.numel() for sequence in usable))
    return torch.stack([sequence[:length] for sequence in usable]).to(torch.int64)


def certify(
    folders: Mapping[str, Path],
    windows: Tensor,
    reference: Callable[[str], nn.Module],
    *,
    scratch_dir: Path,
    command: ClientCommand = client_command,
) -> tuple[FormatCertificate, ...]:
    """Have every format read by its client and compare.

    Args:
        folders: format -> the folder that holds it.
        windows: [n, t] int64 token ids.
        reference: gives our own reading of the model for a format, in float32; called only when its client has answered.
        scratch_dir: emptied and deleted again.
        command: argument list for (format, folder, tokens file, output file).

    Returns:
        One verdict a format, in the order of ``folders``.

    Raises:
        DataError: a client found no room on a disk or in memory.
    """
    remove_folder(scratch_dir)
    scratch_dir.mkdir(parents=True)
    try:
        tokens = scratch_dir / "tokens.safetensors"
        save_file({"tokens": windows.contiguous()}, str(tokens))
        verdicts = []
        for name, folder in folders.items():
            out = scratch_dir / f"{name}.safetensors"
            failure = _run_client(command(name, folder, tokens, out), scratch_dir / f"{name}.log")
            verdict = failure and FormatCertificate(format=name, verdict=failure[0], reason=failure[1])
            verdict = verdict or _judge(name, windows, out, reference)
            logger.log(_LEVEL[verdict.verdict], "Certificate of %s: %s (%s)", name, verdict.verdict.value, verdict.reason)
            verdicts.append(verdict)
        return tuple(verdicts)
    finally:
        remove_folder(scratch_dir)


_LEVEL = {Verdict.PASSED: logging.INFO, Verdict.NO_CLIENT: logging.WARNING, Verdict.FAILED: logging.ERROR}


def compare_outputs(ours: Tensor, logits: Tensor, greedy: Tensor) -> tuple[float, int, int]:
    """Compare a client's output with our logits on the windows followed by the client's own continuation.

    Args:
        ours: [n, t + g, v] float32, our logits.
        logits: [n, t, v] the client's logits on the windows.
        greedy: [n, g] the client's greedy continuation.

    Returns:
        The largest difference of two logits, how many of the client's tokens are not our first choice but within
        ``TIE_MARGIN`` of it, and how many are not even that. Lengths are fractions of the deviation of our logits.
    """
    length = logits.shape[1]
    deviation = ours[:, :length].float().std().clamp(min=torch.finfo(torch.float32).tiny)
    difference = ((ours[:, :length].float() - logits.float()).abs().max() / deviation).item()
    choices = ours[:, length - 1 : length - 1 + greedy.shape[1]].float()
    chosen = choices.gather(-1, greedy.unsqueeze(-1)).squeeze(-1)
    gaps = (choices.max(-1).values - chosen) / deviation
    return difference, int(((gaps > 0) & (gaps <= TIE_MARGIN)).sum()), int((gaps > TIE_MARGIN).sum())


def _run_client(arguments: Sequence[str], log: Path) -> tuple[Verdict, str] | None:
    """Run a client; None when it answered."""
    environment = {
        **without_ranks(os.environ),
        "NUMBA_NUM_THREADS": "1",  # the aqlm package's numba kernel races with more
        "CUDA_VISIBLE_DEVICES": "",  # its CUDA kernels take half precision alone and are compiled at the first forward
        # Threads that wait by spinning made small products 100 times slower on a 2-core machine with another busy process.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            list(arguments), cwd=_PROJECT_ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode == 0:
        return None
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if done.returncode == NO_CLIENT_EXIT:
        return Verdict.NO_CLIENT, said[-1] if said else "the client's package is not installed"
    _check_starved(done.returncode, said)
    logger.error("The client of the format ended with %d:\n%s", done.returncode, "\n".join(said[-40:]))
    return Verdict.FAILED, f"the client ended with {done.returncode}: {said[-1] if said else 'it said nothing'}"


def _check_starved(code: int, said: Sequence[str]) -> None:
    """Tell a client that lacked room on a disk or memory from one that reads a format differently.

    Raises:
        DataError: it did; with the system's words, from which :mod:`jobs.execution` makes an error with advice.
    """
    last = said[-1] if said else ""
    if code == -signal.SIGKILL or "MemoryError" in last or any(words in last.lower() for words in OUT_OF_MEMORY_WORDS):
        raise DataError(f"a format's client ran out of memory: it ended with {code}. {last}")
    if any(os.strerror(number) in last for number in FULL):
        raise DataError(f"a format's client ended with {code}: {last}")


def _judge(name: str, windows: Tensor, out: Path, reference: Callable[[str], nn.Module]) -> FormatCertificate:
    try:
        answer = load_file(str(out))
        logits, greedy = answer["logits"], answer["greedy"]
    except (OSError, SafetensorError, KeyError) as error:
        return FormatCertificate(format=name, verdict=Verdict.FAILED, reason=f"the client's answer cannot be read: {error}")
    problem = _malformed(windows, logits, greedy)
    if problem:
        return FormatCertificate(format=name, verdict=Verdict.FAILED, reason=problem)
    model = reference(name)
    device = next(model.parameters()).device
    with torch.no_grad():
        ours = model(input_ids=torch.cat([windows, greedy], dim=1).to(device), use_cache=False).logits.float().cpu()
    if ours.shape[-1] != logits.shape[-1] or not torch.isfinite(ours).all():
        reason = "our own logits are not finite" if ours.shape[-1] == logits.shape[-1] else "the client's vocabulary differs"
        return FormatCertificate(format=name, verdict=Verdict.FAILED, reason=reason)
    difference, ties, wrong = compare_outputs(ours, logits, greedy)
    passed = difference <= LOGIT_TOLERANCE and not wrong
    reason = f"the client's logits differ by at most {difference:.1e} of their deviation ({LOGIT_TOLERANCE:.0e} allowed), "
    reason += f"{greedy.numel() - ties - wrong} of {greedy.numel()} greedy tokens equal"
    reason += (f", {ties} tied" if ties else "") + (f", {wrong} different" if wrong else "")
    return FormatCertificate(
        format=name,
        verdict=Verdict.PASSED if passed else Verdict.FAILED,
        reason=reason,
        max_logit_difference=difference,
        greedy_tokens=greedy.numel(),
        greedy_ties=ties,
        windows=windows.shape[0],
        window_length=windows.shape[1],
    )


def _malformed(windows: Tensor, logits: Tensor, greedy: Tensor) -> str | None:
    if logits.dim() != 3 or logits.shape[:2] != windows.shape or greedy.dim() != 2 or greedy.shape[0] != windows.shape[0]:
        shapes = [list(tensor.shape) for tensor in (logits, greedy, windows)]
        return "the client answered with logits {} and tokens {} to windows {}".format(*shapes)
    if not torch.isfinite(logits).all():
        return "the client's logits hold NaN or infinity"
    if greedy.numel() and not 0 <= int(greedy.min()) <= int(greedy.max()) < logits.shape[-1]:
        return "the client generated ids outside its vocabulary"
    return None
