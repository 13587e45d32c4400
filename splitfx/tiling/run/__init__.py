"""The pieces computed: in eager mode, and with gradients."""
