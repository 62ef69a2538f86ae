"""The soak: everything that can be tested for longer, for as long as one likes, with one report at the end.

python -m tests.soak --minutes 30 --seed 1
"""
