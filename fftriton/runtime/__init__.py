"""Running a model on a video: checkpoint, frames, inputs, answer and cost."""
