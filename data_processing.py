"""Makes datasets/pokemon of the pictures in imgs/, whose file names carry their text: `python data_processing.py`.

The script of the Pokémon project; `cn-clip dataset from-folder` without its defaults.
"""

from dataclasses import dataclass

from cn_clip import command
from cn_clip.preprocess import dataset_from_folder


@dataclass(frozen=True)
class Options(dataset_from_folder.Options):
    """imgs/0001妙蛙种子.png and its like to datasets/pokemon/{split}_imgs.tsv and {split}_texts.jsonl."""

    output: str = "datasets/pokemon"
    """The folder for the dataset files; made when it is not there"""
    folder: str | None = "imgs"
    """The folder of pictures, sub-folders included"""


if __name__ == "__main__":
    command.execute(dataset_from_folder.run, Options)
