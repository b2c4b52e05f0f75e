"""What the project and the packages that travel along require."""

import email
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement


def unmet_requirements(wheels: Path, project: Path) -> list[str]:
    """What a project (its pyproject.toml) and the wheels in a folder require and the machine lacks, in that version."""
    import tomllib  # from Python 3.11 on, which those machines have

    required = [("gnunet", text) for text in tomllib.loads(project.read_text())["project"]["dependencies"]]
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = email.message_from_bytes(archive.read(name))
        required += [(metadata["Name"], text) for text in metadata.get_all("Requires-Dist", [])]
    lacking = []
    for package, text in required:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            lacking.append(f"{package} needs {requirement.name}{requirement.specifier}, has {found}")
    return lacking
