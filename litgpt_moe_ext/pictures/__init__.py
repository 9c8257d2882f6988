"""What every picture of the project has in common, and the one picture that training draws itself.

A neutral room: `training` logs it while a run goes on, `inspect` draws it from logs afterwards.
"""
