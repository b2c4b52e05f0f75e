"""A normalization is added as its room's README says, and is then configured, documented and built as any other."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from gnunet.config import parse_args
from gnunet.config import unet_kwargs
from gnunet.errors import ConfigError
from gnunet.models import UNet2D
config = parse_args(["--model.norm.kind", "lp", "--model.norm.power", "2"], default_config=CONFIG)
assert config.model.norm.eps == 1e-5
network = UNet2D(**unet_kwargs(config, None))
norm = network.conv_norm_out
assert type(norm).__name__ == "LpNorm" and norm.power == 2
x = torch.randn(2, 32, 4, 4)
rms = x.square().mean((1, 2, 3), keepdim=True).sqrt()
torch.testing.assert_close(norm(x), torch.nn.functional.silu(x / rms), rtol=1e-4, atol=1e-4)
network(torch.randn(2, 3, 32, 32), torch.tensor([0.1, 0.9]))[0].square().mean().backward()
try:
    parse_args(["--model.norm.kind", "lp", "--model.norm.power", "-1"], default_config=CONFIG)
except ConfigError as refusal:
    print(refusal)
"""


def test_one_file_and_two_lines(tmp_path):
    shutil.copytree(ROOT / "gnunet", tmp_path / "gnunet")
    readme = (ROOT / "gnunet/norms/README.md").read_text()
    section = readme[readme.index("## Adding one") :]
    file, code = re.search(r"`(gnunet/norms/\w+\.py)`:\n\n```python\n(.*?)```", section, re.DOTALL).groups()
    import_line, entry = re.search(r"```python\n(from .*)\n\n( +\".*,)\n```", section).groups()
    (tmp_path / file).write_text(code)
    factory = tmp_path / "gnunet/norms/factory.py"
    text = factory.read_text().replace("from .signature", f"{import_line}\nfrom .signature", 1)
    factory.write_text(text.replace('    "derf": Derf,\n', f'    "derf": Derf,\n{entry}\n'))
    program = PROGRAM.replace("CONFIG", f"__import__('pathlib').Path({str(ROOT / 'configs/noto_portraits32.yaml')!r})")
    error = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE,
        text=True, check=True,
    ).stdout  # fmt: skip
    assert "model.norm.power: given -1" in error and "a number, above 0" in error
