# For a CUDA card; the commands are in docs/install.md. Not built yet: no docker was at hand.
# A plain Python is enough of a base: torch's wheels bring CUDA's libraries, and soundfile's brings libsndfile.
FROM python:3.11-slim
WORKDIR /opt/omni-grpo
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY pyproject.toml README.md LICENSE *.py ./
COPY tools tools
RUN pip install --no-cache-dir --no-deps .
# the weights of the Hub, and the folder with your data, in which runs/ is made: both are mounted
ENV HF_HOME=/huggingface
WORKDIR /work
CMD ["omni-grpo"]
