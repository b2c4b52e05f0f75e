import torch

from gnunet.environment import activation_bytes


def test_activation_bytes_counts_each_storage_once_and_no_excluded_tensor():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def step():
        h = layer(x)
        (h.exp() + h.exp()).sum().backward()  # each exp saves its own result: 2 x 128 bytes; linear saves x: 128

    assert activation_bytes(step, layer.parameters()) == 3 * 4 * 8 * 4
