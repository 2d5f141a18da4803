"""The bench: seeded workloads, run by the milestones and by Hugging Face, measured side by side on one machine.

Read in this order: `workloads.py` (what is asked), `engines.py` and `peers.py` (who answers), `record.py` (what is kept
of a run), `machine.py` and `roofline.py` (what the machine could do), `runner.py` (rounds), `report.py` (medians).
"""
