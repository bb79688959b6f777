"""The check of the Hopper kernels: its limits bite; and every case keeps them, where JAX's CUDA plugin is installed."""

import importlib.util
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType

from kernels_pallas import check_gpu
from kernels_pallas.traffic import passes

IS_INSTALLED = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
SAID = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
    0 bytes stack frame, {spills} bytes spill stores, 8 bytes spill loads
ptxas info    : Used {registers} registers, used 16 barriers, 1 bytes smem
{more}"""
CODE = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR36]\nUTMALDG.2D [UR8], [UR4]\n"


def kernel(folder, code=CODE, shared=229440, spills=8, more=""):
    (folder / "k_0.ptxas").write_text(SAID.format(registers=168, spills=spills, more=more))
    (folder / "k_0.mlir-passes.log").write_text(f"gpu.launch\n dynamic_shared_memory_size %c{shared}_i32 {{\n")
    (folder / "k_0.sass_ctrl").write_text(code)
    return check_gpu.kernel(folder / "k_0.ptxas")


def test_a_kernel_within_the_limits(tmp_path):
    assert kernel(tmp_path) == ("168 registers, 8 B spilt, 224.1 KiB shared, 1 HGMMA, 1 UTMALDG", [])


@pytest.mark.parametrize(
    ("defect", "limit"),
    [
        ({"code": "UTMALDG.2D [UR8], [UR4]"}, "no HGMMA"),
        ({"code": "HGMMA.64x256x16.F32.BF16 R24"}, "no UTMALDG"),
        ({"code": CODE.replace("HGMMA", "HMMA")}, "no HGMMA"),
        ({"spills": 68}, "68 bytes of registers spilt"),
        ({"shared": 232452}, "232452 bytes of shared memory"),
        ({"more": "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"}, "serialised"),
    ],
)
def test_each_limit_bites(defect, limit, tmp_path):
    _, (broken,) = kernel(tmp_path, **defect)
    assert limit in broken


class Program:
    """Stands for a compiled case."""

    def __init__(self, temporaries=0, kernels=1):
        self.temp_size_in_bytes, self.kernels = temporaries, kernels

    def memory_analysis(self):
        return self

    def as_text(self):
        return 'custom_call_target="mosaic_gpu_v2"\n' * self.kernels


def checked(folder, monkeypatch, program=None, **dumped):
    """Whether a case of 10 bytes that compiles to `program`, and leaves the dumps of a kernel, keeps its limits."""

    def compiled(function, arguments, mesh):
        if program is None:
            raise RuntimeError("ptxas died")
        kernel(folder, **dumped)
        return program

    monkeypatch.setattr(check_gpu, "compiled", compiled)
    return check_gpu.check("case", (None, (), 10), None, folder)


def test_a_case_within_its_limits(tmp_path, monkeypatch, capsys):
    assert checked(tmp_path, monkeypatch, Program(10))
    assert "k_0: 168 registers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "dumped", "reason"),
    [
        (None, {}, "FAILED to compile: RuntimeError: ptxas died"),
        (Program(kernels=0), {}, "FAILED: no Mosaic kernel in the program"),
        (Program(11), {}, "FAILED: temporaries of 11 bytes > 10"),
        (Program(), {"spills": 68}, "FAILED: k_0: 68 bytes of registers spilt"),
    ],
)
def test_a_case_beyond_its_limits_fails(program, dumped, reason, tmp_path, monkeypatch, capsys):
    assert not checked(tmp_path, monkeypatch, program, **dumped)
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize("sees", [True, False])
def test_a_run_that_sees_no_kernel_fails(sees, monkeypatch, capsys):
    def compiled(function, arguments, mesh):
        if sees:
            kernel(Path(os.environ["MOSAIC_GPU_DUMP_TO"]))
        return Program()

    monkeypatch.setattr(check_gpu, "compiled", compiled)
    monkeypatch.setattr(check_gpu, "hopper_mesh", lambda: None)
    for name in ("MOSAIC_GPU_DUMP_TO", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):
        monkeypatch.setenv(name, "")  # what `main` sets is taken back
    assert check_gpu.main(["v2 lite down"]) == (not sees)
    assert ("FAILED: no kernel was assembled" in capsys.readouterr().out) == (not sees)


HLO = """
ENTRY %main (x: bf16[4096,5120]) -> bf16[45056,5120] {
  %x.1 = bf16[4096,5120]{1,0:T(8,128)(2,1)} parameter(0)
  %i.1 = s32[45056]{0} parameter(1)
  %pad.0 = bf16[4097,5120]{1,0:T(8,128)(2,1)} pad(%x.1, %zero), padding=0_1x0_0, metadata={op_name="f(%x.1)"}
  %copy-start = (bf16[4096,5120]{1,0}, bf16[4096,5120]{1,0}, u32[]) copy-start(%x.1)
  %small = s32[1000]{0} fusion(%i.1), kind=kLoop
  %gather_fusion = bf16[45056,5120]{1,0} fusion(%pad.0, %i.1), kind=kCustom, calls=%fused_computation
  ROOT %both = (f32[100]{0}, f32[100]{0}) fusion(%x.1, /*index=1*/%gather_fusion), kind=kInput
}
"""


def test_what_a_program_moves_is_read_from_its_text():
    """A gather reads what it writes, not its whole operand; copies ahead and small arrays are left out."""
    row, index = 2 * 5120, 4 * 45056
    assert passes(HLO) == {
        "pad.0": (4096 * row, 4097 * row),
        "gather_fusion": (45056 * row + index, 45056 * row),
        "both": ((4096 + 45056) * row, 800),
    }


@pytest.mark.parametrize(
    ("temporaries", "name", "kept"), [(0, "both", True), (1 << 20, "both", False), (0, "x", False)]
)
def test_dispatch_in_more_passes_or_with_a_copy_fails(temporaries, name, kept, monkeypatch, capsys):
    """`name`: of the programs with these three passes, which is held to three."""
    program = Program(temporaries)
    monkeypatch.setattr(program, "as_text", lambda: HLO, raising=False)
    monkeypatch.setattr(check_gpu, "compiled", lambda *_: program)
    monkeypatch.setattr(check_gpu, "abstract_cases", lambda **_: {"both": (None, ()), "x": (None, ())})
    monkeypatch.setattr(check_gpu, "PASSES", {"both": 3, "x": 2})
    assert check_gpu.check_passes(name, None) == kept
    assert ("FAILED" in capsys.readouterr().out) == (not kept)


def test_a_case_that_does_not_exist_fails(capsys):
    assert check_gpu.main(["no such case"]) == 1
    assert "grouped_matmul/v2 down" in capsys.readouterr().out


@pytest.mark.parametrize("op", sorted({name.split("/")[0] for name in check_gpu.cases()}))
def test_cases_are_at_full_size(op):
    """Of V2 and of Lite, each a function of abstract arrays with a budget."""
    cases = {name: case for name, case in check_gpu.cases().items() if name.startswith(f"{op}/")}
    assert any("lite" in name for name in cases)
    assert any("lite" not in name for name in cases)
    for function, arguments, temporaries in cases.values():
        assert callable(function)
        assert all(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(arguments))
        assert temporaries >= 0


@pytest.fixture
def on_hopper():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.fixture
def shared(monkeypatch):
    """Bytes of shared memory that each kernel traced asks for."""
    found, kernel = [], plgpu.kernel

    def counted(body, *, scratch_types, **options):
        refs = [x for x in jax.tree.leaves(scratch_types) if getattr(x, "memory_space", None) == plgpu.SMEM]
        found.append(sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in refs))
        return kernel(body, scratch_types=scratch_types, **options)

    monkeypatch.setattr(plgpu, "kernel", counted)
    return found


@pytest.mark.parametrize("name", check_gpu.cases())
def test_scratch_of_full_shapes_fits_the_shared_memory(name, on_hopper, shared):
    function, arguments, _ = check_gpu.cases()[name]
    jax.eval_shape(function, *arguments)
    assert shared
    assert 64 << 10 < max(shared) <= check_gpu.SHARED_MEMORY


LOWERED = ["grouped_matmul/v2 lite swiglu gradients", "grouped_matmul/v2 lite int8 swiglu"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in LOWERED else pytest.mark.slow) for name in check_gpu.cases()]
)
def test_full_shapes_lower(name, on_hopper):
    """Down to where the compiler for the chip takes over, which needs none of its packages."""
    function, arguments, _ = check_gpu.cases()[name]
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "@mosaic_gpu" in program


@pytest.fixture(scope="session")
def dumps(tmp_path_factory):
    """One folder: a kernel is dumped once a process, where the process first compiles it."""
    return tmp_path_factory.mktemp("dumps")


@pytest.mark.slow
@pytest.mark.skipif(
    not IS_INSTALLED, reason="JAX's CUDA plugin is not installed: kernels_pallas/check_gpu.sh brings it"
)
@pytest.mark.parametrize("name", check_gpu.cases())
def test_full_shapes_compile_within_the_limits(name, dumps, monkeypatch, capsys):
    for variable, value in {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_TO": str(dumps)}.items():
        monkeypatch.setenv(variable, value)
    assert check_gpu.check(name, check_gpu.cases()[name], check_gpu.hopper_mesh(), dumps), capsys.readouterr().out
    assert any(dumps.glob("*.ptxas"))  # else nothing was looked at


@pytest.mark.slow
@pytest.mark.skipif(
    not IS_INSTALLED, reason="JAX's CUDA plugin is not installed: kernels_pallas/check_gpu.sh brings it"
)
@pytest.mark.parametrize("name", check_gpu.PASSES)
def test_rows_are_dispatched_and_combined_in_few_passes(name, monkeypatch, capsys):
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    assert check_gpu.check_passes(name, check_gpu.hopper_mesh()), capsys.readouterr().out
