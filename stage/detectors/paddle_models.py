"""`python -m stage.detectors.paddle_models FOLDER`: models for PaddleOCR 3 from the weights in RapidOCR's wheel."""

from __future__ import annotations

import argparse
from pathlib import Path

from stage.detectors.paddle_ocr import model_folders
from stage.detectors.rapid_ocr import weight_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for folder in model_folders(*weight_files(), parser.parse_args().folder):
        print(folder)


if __name__ == "__main__":
    main()
