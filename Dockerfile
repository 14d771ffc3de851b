# docker build -t cn-clip . && docker run --stop-timeout 45 -p 127.0.0.1:8000:8000 -v cn-clip-models:/models cn-clip
# compose.yaml makes an index of a folder of photos too. --stop-timeout is longer than --drain-timeout: what is in hand
# finishes first. tools/try_image.py runs these steps without Docker.
FROM python:3.12-slim

RUN useradd --create-home --uid 10001 cnclip && install -d -o cnclip /models /index
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE.md cn_clip_next.py ./
COPY tools/emoji_dataset tools/emoji_dataset
COPY tools/grid_font tools/grid_font
COPY cn_clip cn_clip
# torch from the index of CPU builds first: those of PyPI bring CUDA along. The constraint keeps the second line from
# replacing it.
RUN pip install --no-cache-dir --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --no-cache-dir --constraint constraints.txt '.[serve,onnx,openvino,search,photos,video]'

USER cnclip
VOLUME /models /index
EXPOSE 8000
# The page, too, comes from there. An `index build` in this image has no such port, and compose.yaml turns it off.
HEALTHCHECK --interval=30s --timeout=3s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
# Give CN_CLIP_API_KEY: the service listens to everyone who reaches the container. Without a key, requests may name it
# by localhost, an address, or what --allowed-host says, such as the name of a Compose service.
ENTRYPOINT ["cn-clip"]
# auto: the fastest precision that this processor has and that is close to float32.
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--download-root", "/models", "--model", "ViT-B-16", "--backend", "openvino", "--precision", "auto"]
