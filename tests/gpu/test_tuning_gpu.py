"""PV-Tuning on CUDA devices: the losses of the CPU, on one device and on several, and the memory that one step takes."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from algorithms.base import Artifact
from algorithms.finetuning.distillation.adam import AdamRule
from algorithms.finetuning.distillation.loop import LoopSettings, Surroundings, distill
from algorithms.finetuning.distillation.models import Computation, assemble
from algorithms.finetuning.distillation.students.additive_student import AdditiveStudent, PvSettings
from algorithms.finetuning.distillation.students.coded_linear import CodedLinear
from algorithms.finetuning.distillation.teacher import LiveTeacher
from algorithms.modeling.source import ModelSource
from algorithms.numerics.codebooks.additive import AdditiveCodes
from algorithms.parallel.ranks import Ranks
from tests.support.rank_processes import run_on_ranks
from tests.unit.algorithms.quantization.aqlm.tunings import KilledError, calibrate, killed_at, report_of, tune

DEVICE = torch.device("cuda")
LARGE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
LENGTH = 1024
BYTES_A_PARAMETER = 40  # of weight, gradient, target and moments, teacher included; and room for the V-step of one layer
LOGITS_COPIES = 6

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _on_device():
    return {"device": DEVICE, "ranks": Ranks(device=DEVICE)}


def test_a_device_learns_what_the_cpu_learns(tmp_path):
    source, calibrated = calibrate(tmp_path)
    expected = report_of(tune(source, calibrated, tmp_path / "cpu"))["losses"]
    found = report_of(tune(source, calibrated, tmp_path / "device", context=_on_device()))["losses"]
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("changes", [{"amp_dtype": "bfloat16"}, {"amp_dtype": "float16", "load_dtype": "float16"}])
def test_shorter_floats_are_near(tmp_path, changes):
    source, calibrated = calibrate(tmp_path)
    expected = report_of(tune(source, calibrated, tmp_path / "cpu"))["losses"]
    found = report_of(tune(source, calibrated, tmp_path / "device", context=_on_device(), **changes))["losses"]
    assert found == pytest.approx(expected, rel=0.2)


def test_a_checkpoint_of_a_device_is_gone_on_from_without_one(tmp_path):
    source, calibrated = calibrate(tmp_path)
    expected = report_of(tune(source, calibrated, tmp_path / "cpu"))["losses"]
    context = {**_on_device(), "progress": killed_at(4)}
    with pytest.raises(KilledError):
        tune(source, calibrated, tmp_path / "device", context=context, save_every_steps=1)
    assert (tmp_path / "device" / ".checkpoint-3").is_dir()
    found = report_of(tune(source, calibrated, tmp_path / "device", save_every_steps=1))["losses"]
    assert found == pytest.approx(expected, rel=1e-2)


def _on_a_rank(ranks, base, calibrated, folder):
    artifact = Artifact(kind="aqlm-calibration", directory=Path(calibrated), digest="calibrated")
    context = {"device": ranks.device, "ranks": ranks}
    return report_of(tune(ModelSource(Path(base)), artifact, Path(folder), context=context, save_every_steps=1))["losses"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_all_devices_together_learn_what_the_cpu_learns(tmp_path):
    source, calibrated = calibrate(tmp_path)
    expected = report_of(tune(source, calibrated, tmp_path / "cpu"))["losses"]
    folders = (str(source.directory), str(calibrated.directory), str(tmp_path / "shared"))
    losses = run_on_ranks(_on_a_rank, torch.cuda.device_count(), *folders, on="cuda", limit=180)
    assert all(other == losses[0] for other in losses)
    assert losses[0] == pytest.approx(expected, rel=1e-2)


def _random(shape, generator, spread=0.02, dtype=torch.float32):
    return (spread * torch.randn(shape, generator=generator, device=generator.device)).to(dtype)


def _random_codes(linear, generator):
    """Codes 2x8 g8 with weights of the usual spread."""
    rows, columns = linear.weight.shape
    return AdditiveCodes(
        codes=torch.randint(256, (rows, columns // 8, 2), generator=generator, device=generator.device),
        codebooks=_random((2, 256, 1, 8), generator, spread=0.5**0.5),
        scales=torch.full((rows,), 0.02, device=generator.device),
    )


def _filled(block, generator, dtype):
    """A block's parameters, random matrices and norms of one."""
    for name, parameter in list(block.named_parameters()):
        value = _random(parameter.shape, generator, dtype=dtype) if parameter.dim() > 1 else torch.ones(parameter.shape)
        owner, _, last = name.rpartition(".")
        block.get_submodule(owner).register_parameter(last, nn.Parameter(value.to(generator.device, dtype), False))
    return block


def _model(source, how, *, coded):
    """A random model on the device, built there: a student with master weights in float32, or a teacher in bfloat16."""
    device, dtype = how.ranks.device, torch.float32 if coded else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def fill(index, block):
        for name in source.architecture.linears if coded else ():
            weight = _random_codes(block.get_submodule(name), generator)
            new = CodedLinear(
                weight, None, container=torch.int16, master=dtype, compute=how.amp_dtype, ranks=how.ranks
            )  # fmt: skip
            block.set_submodule(name, new)
        if coded:
            for norm in (part for name, part in block.named_modules() if "norm" in name):
                _filled(norm, generator, dtype).requires_grad_(True)
            return block
        return _filled(block, generator, dtype)

    sizes = {name: p.shape for name, p in source.skeleton().named_parameters() if not name.startswith("model.layers.")}
    outside = {name: _random(shape, generator, dtype=dtype) for name, shape in sizes.items()}
    model = assemble(source, outside, fill, how, recomputes=coded)
    for name in sizes if coded else ():
        model.get_parameter(name).requires_grad_(True)
    return model


def test_the_memory_of_a_step_of_a_larger_model(tmp_path, record_property):
    LlamaConfig(**LARGE).save_pretrained(tmp_path)
    source, ranks = ModelSource(tmp_path), Ranks(device=DEVICE)
    how = Computation(ranks=ranks, amp_dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    teacher = LiveTeacher(_model(source, how, coded=False), how.autocast)
    rules = {"rule": AdamRule(beta1=0.9, beta2=0.95, lamb=True), "code_rule": AdamRule(beta1=0.0, beta2=0.95, lamb=True)}
    student = AdditiveStudent(_model(source, how, coded=True), PvSettings(lr=1e-3, code_lr=1e-2, **rules), ranks)
    linears = [part for part in student.model.modules() if isinstance(part, CodedLinear)]
    parameters = sum(part.out_features * part.in_features for part in linears) + 2 * 32000 * 2048
    assert parameters > 4e8
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(LARGE["vocab_size"], (1, LENGTH), generator=generator) for _ in range(4)]
    around = Surroundings(
        name="PV-Tuning", rates="lr", ranks=ranks, directory=tmp_path / "run", autocast=how.autocast,
        metrics=lambda line: None, advance=lambda note: None,
    )  # fmt: skip
    before = linears[0].codebooks.detach().clone()
    settings = LoopSettings(max_epochs=1, batch_size=4, micro_batch_size=2, save_every=100)
    history = distill(student, teacher, sequences, [], settings, around)
    peak = torch.cuda.max_memory_allocated()
    record_property("parameters", parameters)
    record_property("peak_memory_bytes", peak)
    assert len(history.losses) == 1
    assert math.isfinite(history.losses[0])
    assert history.losses[0] > 0
    assert not torch.equal(linears[0].codebooks, before)
    assert peak < BYTES_A_PARAMETER * parameters + LOGITS_COPIES * 2 * LENGTH * LARGE["vocab_size"] * 4
