"""Published numbers, one file each: `boot`, `compute`, `idle`, `nano`, `programs`, `system`. Always a ratio on one
machine in one run. `profile` says where the time goes.

`command.py` is their command line, `engines.py` starts what is compared, `guests.py` makes what runs in it, `rounds.py`
reads what a guest measured itself, `figures.py` does the arithmetic, `report.py` the table and the JSON.
"""
