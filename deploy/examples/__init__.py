"""Small programs that show kvatlas at work; each runs with ``python -m kvatlas.deploy.examples.NAME``."""
