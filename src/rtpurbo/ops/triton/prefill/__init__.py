"""Attention of many query rows; `rtpurbo.ops.triton.headwise` joins the parts."""
