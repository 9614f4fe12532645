"""The tasks by name. A new task is a file with a constant `TASK`, and a line here."""

from utils.tasks import classification, detection, segmentation

TASKS = {task.name: task for task in (classification.TASK, segmentation.TASK, detection.TASK)}
