"""The self-test of the kernels: on a GPU, or in Triton's interpreter."""

from fftriton_kernels import implementation, self_test


def test_every_kernel_is_right_here(device):
    served = "Triton" if device == "cuda" else "Triton interpreter"
    assert implementation(device) == served
    checks = self_test(device)
    assert [check.fault for check in checks] == [""] * len(checks)
    assert {check.implementation for check in checks} == {served}
