# The service, and, as a target of its own, a Datasette to look into its store. See docker-compose.yml.

FROM python:3.11-slim-bookworm AS base
# One user for both: the store's files belong to it, and nobody else may read them.
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent exlab \
    && install --directory --owner=exlab --group=exlab --mode=0750 /var/lib/exlab-sessions \
    && install --directory --owner=exlab --group=exlab --mode=2770 /data
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY app app
COPY exlab_sessions exlab_sessions
COPY migrations migrations
RUN PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
    pip wheel --no-deps --wheel-dir /wheel .

FROM base AS datasette
RUN pip install datasette==0.65.5
USER exlab
EXPOSE 8001
# Not --immutable: SQLite would then ignore the write-ahead log, and read torn pages of a file that changes.
# A file that can change is opened with mode=ro. A download would be without the log, so there is none.
ENTRYPOINT ["datasette", "serve", "--host", "0.0.0.0", "--port", "8001", \
    "--setting", "sql_time_limit_ms", "3000", \
    "--setting", "default_cache_ttl", "0", \
    "--setting", "allow_download", "off"]
CMD ["/var/lib/exlab-sessions/sessions.sqlite3"]

FROM base AS service
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheel /tmp/wheel
RUN pip install --constraint /tmp/constraints.txt /tmp/wheel/*.whl && rm -r /tmp/wheel /tmp/constraints.txt
USER exlab
# The default state folder becomes /var/lib/exlab-sessions.
ENV XDG_STATE_HOME=/var/lib
VOLUME ["/var/lib/exlab-sessions", "/data"]
ENTRYPOINT ["exlab-sessions"]
CMD ["serve", "--config", "/lab/config.yaml"]
