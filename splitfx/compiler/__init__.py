"""Plans, passes and the pipeline that holds each pass to its promise."""
