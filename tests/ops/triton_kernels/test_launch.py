"""How compiled Triton kernels are launched."""

from types import SimpleNamespace

import pytest

driver = pytest.importorskip("triton.backends.nvidia.driver", reason="needs Triton")
from gnunet.ops.triton_kernels.launch import launch_call  # noqa: E402


def launcher(calls: list, **scratch: int) -> object:
    """Triton's own, but for the C function."""
    made = object.__new__(driver.CudaLauncher)
    sizes = dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0) | scratch
    vars(made).update(sizes, global_scratch_align=1, profile_scratch_align=1, num_ctas=1)
    vars(made).update(launch_cooperative_grid=False, launch_pdl=True, arg_annotations=[3], kernel_signature=b"4")
    vars(made).update(launch=lambda *args: calls.append(args))
    return made


def test_the_c_function_is_given_what_tritons_launcher_gives_it():
    calls: list = []
    compiled = SimpleNamespace(run=launcher(calls), function=7, packed_metadata=(8, 1))
    compiled.run(5, 1, 1, 9, 7, (8, 1), None, None, None, 64, "two")
    launch, before, after, is_packed = launch_call(compiled, 5, 2)
    assert len(calls) == 1 and launch is compiled.run.launch
    launch(*before, 9, *after, *([(64, "two")] if is_packed else [64, "two"]))
    assert calls[0] == calls[1]


def test_a_launcher_that_allocates_memory_is_called_itself():
    compiled = SimpleNamespace(run=launcher([], global_scratch_size=64), function=7, packed_metadata=(8, 1))
    launch, before, after, is_packed = launch_call(compiled, 5, 2)
    assert (launch, before, after, is_packed) == (compiled.run, (5, 1, 1), (7, (8, 1), None, None, None), False)


def test_a_launcher_with_a_call_of_another_form_is_called_itself():
    class Launcher:
        global_scratch_size = profile_scratch_size = 0

        def __call__(self, *args):
            self.launch([args])

        def launch(self, args): ...

    compiled = SimpleNamespace(run=Launcher(), function=7, packed_metadata=(8, 1))
    assert launch_call(compiled, 5, 2).launch is compiled.run
