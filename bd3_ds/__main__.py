"""`python -m bd3_ds MODE …`"""

from bd3_ds.cli import console

if __name__ == "__main__":
    console()
