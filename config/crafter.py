# The embedded default: train.py's own settings are Crafter's, so there is nothing to override. Copy this file for an experiment of yours.
