from pctt.layers.dense import Dense

__all__ = ["Dense"]
