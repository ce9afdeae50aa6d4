# CPU:   docker build -t pmixseg .
# CUDA:  docker build -t pmixseg:cuda --build-arg TORCH_BACKEND=cu130 .
# Check: docker run --rm -v "$PWD/work:/workspace" pmixseg quickstart
FROM python:3.11-slim-bookworm

# Which build of PyTorch: cpu, or a CUDA version. CUDA's libraries come with PyTorch, so the image
# needs only the driver of its host.
ARG TORCH_BACKEND=cpu

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    HOME=/tmp \
    UV_SYSTEM_PYTHON=1 \
    UV_NO_CACHE=1

RUN pip install --no-cache-dir uv==0.13.9

WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY pmixseg ./pmixseg
RUN uv pip install --torch-backend "$TORCH_BACKEND" -c constraints.txt '.[parquet,export,dicom,preprocess,hub]' \
    && pmixseg --version

# Not root, and any --user may write where its folder is mounted.
RUN useradd --create-home --uid 1000 pmixseg && mkdir /workspace && chmod 1777 /workspace
USER 1000
WORKDIR /workspace
ENTRYPOINT ["pmixseg"]
CMD ["--help"]
