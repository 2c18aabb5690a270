"""Scripts that run in the interpreter of a contender; pctt asks them through pipes and does not import
them.
"""
