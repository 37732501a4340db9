"""The headline of every paper as an experiment, one file a method: ``claims/<slug>.py`` holds one ``CLAIM``."""
