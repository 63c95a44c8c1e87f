"""Running a model on a video: the checkpoint, the frames, the inputs, the answer and what it costs."""
