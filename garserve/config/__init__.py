"""What a GAR checkpoint's JSON files say, read as plain data (floor 1: any room may import it)."""

from garserve.config.files import parse_config, read_config, read_json
from garserve.config.gar import ARCHITECTURES, BoxScale, GARConfig, TowerTraits, VisionConfig

__all__ = [
    "ARCHITECTURES",
    "BoxScale",
    "GARConfig",
    "TowerTraits",
    "VisionConfig",
    "parse_config",
    "read_config",
    "read_json",
]
