"""What a training batch takes: pctt beside torch backprop, beside other libraries, and beside the floor.

Every contender is a process of its own (`workers/serve.py`), asked by `measuring` in rounds; `sameness` sees
that they do the same work.
"""
