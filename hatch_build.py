"""What a release says of itself: where it lies, if that is told, and a README whose links lead there."""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<image>!?)(?P<text>\[[^]]*\])\((?!https?:|#)(?P<path>[^)]+)\)")


class ReleaseMetadata(MetadataHookInterface):
    """Adds the README, and with `GLASSFLOWS_REPOSITORY=https://github.com/owner/name` addresses."""

    def update(self, metadata: dict) -> None:
        root, address = Path(self.root), os.environ.get("GLASSFLOWS_REPOSITORY")
        readme = (root / "README.md").read_text(encoding="utf-8")
        if address:
            (version,) = re.findall(r'^__version__ = "(.*)"$', (root / "src/glassflows/__init__.py").read_text(), re.M)
            kind = {"!": "raw", "": "blob"}
            metadata["urls"] = {
                "Repository": address,
                "Documentation": f"{address}/blob/v{version}/docs/start.md",
                "Changelog": f"{address}/blob/v{version}/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }
            readme = LINK.sub(
                lambda m: f"{m['image']}{m['text']}({address}/{kind[m['image']]}/v{version}/{m['path']})", readme
            )
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
