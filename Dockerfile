# A server for one sparse model on NVIDIA GPUs: vLLM, rtpurbo's plugin and an export.
#
#   rtpurbo export smollm2-sparse export --to vllm
#   docker build -t rtpurbo-serve .
#   docker run --gpus all --ipc=host -p 8000:8000 -v "$PWD/export:/model:ro" rtpurbo-serve
#
# Arguments after the image's name go to `rtpurbo serve`: --max-model-len, -tp, --api-key, ...
# To put the export into the image: docker build --build-context model=export --target with-model .
ARG VLLM_VERSION=0.32.0
FROM vllm/vllm-openai:v${VLLM_VERSION} AS server

# rtpurbo's own dependencies only: torch, triton and transformers stay as vLLM pins them.
COPY pyproject.toml LICENSE /src/rtpurbo/
COPY src /src/rtpurbo/src
RUN python3 -m pip install --no-cache-dir --no-deps /src/rtpurbo \
    && python3 -m pip install --no-cache-dir accelerate peft gguf "typer>=0.19" rich
RUN python3 -c "from importlib.metadata import entry_points; assert 'rtpurbo' in entry_points(group='vllm.general_plugins').names" \
    && python3 -c "from rtpurbo.serving.installation import find_vllm; print(find_vllm())"

ENV HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
EXPOSE 8000
ENTRYPOINT ["rtpurbo", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]

FROM server AS with-model
COPY --from=model . /model

FROM server
