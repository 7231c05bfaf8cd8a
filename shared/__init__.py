"""What both stages stand on: data, training, sampling, measuring, showing, and the commands around them."""

__version__ = "0.2.0"
