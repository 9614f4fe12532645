"""How the demo's networks were trained. Nothing here is needed to run the demo."""
