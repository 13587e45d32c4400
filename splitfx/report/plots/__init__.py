"""Pictures of results, each a png, svg or pdf file; only `picture` imports matplotlib."""
