"""What a run holds, in bytes, before it is tried: sizes, the plan of a step over time, and the policies that fit."""
