"""As data_processing.py, with traditional characters turned into simplified ones: `python data_t2s.py`.

The script of the Pokémon project; here it writes the whole dataset, and data_processing.py need not follow.
"""

from dataclasses import dataclass

import data_processing
from cn_clip import command
from cn_clip.preprocess import dataset_from_folder


@dataclass(frozen=True)
class Options(data_processing.Options):
    """imgs/0001妙蛙種子.png and its like to datasets/pokemon, with the text 妙蛙种子."""

    simplify: bool = True
    """Turn traditional characters into simplified ones"""


if __name__ == "__main__":
    command.execute(dataset_from_folder.run, Options)
