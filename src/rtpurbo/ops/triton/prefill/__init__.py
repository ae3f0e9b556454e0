"""Prefill attention; combined by `rtpurbo.ops.triton.headwise`."""
