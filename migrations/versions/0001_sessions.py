"""Sessions, their histories, and what guards them.

The heart of it: an event moves its session. `events_move` folds each inserted event into the row of its
session, `sessions_move` lets the state change along an edge only and only as the newest telling event
says. The open prompt follows the history in the same way. So row, prompt and history cannot come apart, not
even by a hand on the SQLite shell.

An INSERT OR REPLACE deletes the row that is in its way without asking the guards of DELETE, so the guards of
INSERT look for one.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STATES = (
    ("pending", None, 0),
    ("validating", "validating_inputs", 0),
    ("rendering", "rendering_template", 0),
    ("plugin_pass", "running_plugins", 0),
    ("input_required", "input_required", 0),
    ("cache_write", "writing_cache", 0),
    ("post_validate", "validating_post_creation", 0),
    ("sync_queued", "queueing_nas_sync", 0),
    ("done", "done", 1),
    ("failed", None, 1),
    ("aborted", None, 1),
)
ROAD = (
    ("pending", "validating"),
    ("validating", "rendering"),
    ("rendering", "plugin_pass"),
    ("plugin_pass", "input_required"),
    ("input_required", "plugin_pass"),
    ("plugin_pass", "cache_write"),
    ("cache_write", "post_validate"),
    ("post_validate", "sync_queued"),
    ("sync_queued", "done"),
)
LIVE = tuple(state for state, _, terminal in STATES if not terminal)
EDGES = (
    *ROAD,
    *((state, "failed") for state in LIVE),
    *((state, "aborted") for state in LIVE if state != "sync_queued"),
)

TABLES = """
CREATE TABLE store_facts (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE states (
    state TEXT PRIMARY KEY,
    phase TEXT,
    terminal INTEGER NOT NULL CHECK (terminal IN (0, 1))
) STRICT, WITHOUT ROWID;

CREATE TABLE edges (
    from_state TEXT NOT NULL REFERENCES states (state),
    to_state TEXT NOT NULL REFERENCES states (state),
    PRIMARY KEY (from_state, to_state)
) STRICT, WITHOUT ROWID;

CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY CHECK (length(session_id) = 36),
    kind TEXT NOT NULL CHECK (kind IN ('project', 'run')),
    run_kind TEXT CHECK (run_kind IN ('experimental', 'test')),
    state TEXT NOT NULL REFERENCES states (state),
    label TEXT NOT NULL,
    operator TEXT NOT NULL,
    equipment_id TEXT NOT NULL,
    project_short_id TEXT,
    template_path TEXT NOT NULL,
    destination TEXT,
    destination_key TEXT,
    project_key TEXT,
    local_root TEXT,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    ended_at TEXT,
    head_seq INTEGER NOT NULL DEFAULT 0 CHECK (head_seq >= 0),
    recoveries INTEGER NOT NULL DEFAULT 0 CHECK (recoveries >= 0),
    step_deaths INTEGER NOT NULL DEFAULT 0 CHECK (step_deaths >= 0),
    driven INTEGER NOT NULL DEFAULT 0 CHECK (driven IN (0, 1)),
    alone INTEGER NOT NULL DEFAULT 0 CHECK (alone IN (0, 1)),
    tree TEXT,
    rendered TEXT CHECK (rendered IS NULL OR json_valid(rendered)),
    findings TEXT CHECK (findings IS NULL OR json_valid(findings)),
    blocked_on TEXT CHECK (blocked_on IS NULL OR json_valid(blocked_on)),
    cancel_requested_at TEXT,
    cancel TEXT CHECK (cancel IS NULL OR json_valid(cancel)),
    partial_path TEXT,
    sync_status TEXT CHECK (sync_status IN ('pending', 'blocked_by_validation', 'synced', 'failed')),
    error TEXT CHECK (error IS NULL OR json_valid(error)),
    result TEXT CHECK (result IS NULL OR json_valid(result)),
    retry_of TEXT,
    principal TEXT NOT NULL,
    trace_id TEXT NOT NULL,
    request TEXT NOT NULL CHECK (json_valid(request)),
    pinned TEXT CHECK (pinned IS NULL OR json_valid(pinned)),
    CHECK ((kind = 'run') = (run_kind IS NOT NULL)),
    CHECK ((ended_at IS NOT NULL) = (state IN ('done', 'failed', 'aborted'))),
    CHECK ((result IS NOT NULL) = (state = 'done')),
    CHECK ((error IS NOT NULL) = (state IN ('failed', 'aborted'))),
    CHECK ((cancel IS NOT NULL) = (cancel_requested_at IS NOT NULL)),
    CHECK (state IN ('pending', 'validating', 'failed', 'aborted')
           OR (destination IS NOT NULL AND destination_key IS NOT NULL AND pinned IS NOT NULL)),
    CHECK (state NOT IN ('plugin_pass', 'input_required', 'cache_write', 'post_validate', 'sync_queued')
           OR tree IS NOT NULL)
) STRICT;

CREATE UNIQUE INDEX sessions_destination ON sessions (destination_key)
    WHERE destination_key IS NOT NULL AND state NOT IN ('done', 'failed', 'aborted');
CREATE INDEX sessions_project ON sessions (project_key)
    WHERE project_key IS NOT NULL AND state NOT IN ('done', 'failed', 'aborted');
CREATE INDEX sessions_live ON sessions (session_id) WHERE state NOT IN ('done', 'failed', 'aborted');
CREATE INDEX sessions_state ON sessions (state, session_id);
CREATE INDEX sessions_equipment ON sessions (equipment_id, session_id);
CREATE INDEX sessions_partial ON sessions (ended_at) WHERE partial_path IS NOT NULL;

CREATE TABLE events (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    session_id TEXT NOT NULL REFERENCES sessions (session_id),
    seq INTEGER NOT NULL CHECK (seq >= 1),
    kind TEXT NOT NULL CHECK (kind IN ('phase', 'progress', 'input_required', 'input_received', 'warning',
                                       'recovered', 'done', 'failed')),
    at TEXT NOT NULL,
    frame TEXT NOT NULL CHECK (json_valid(frame)),
    CHECK (length(CAST(frame AS BLOB)) <= 262144),
    CHECK (json_extract(frame, '$.kind') = kind),
    CHECK (json_extract(frame, '$.seq') = seq),
    CHECK (json_extract(frame, '$.at') = at),
    UNIQUE (session_id, seq)
) STRICT;

CREATE TABLE prompts (
    prompt_id TEXT PRIMARY KEY,
    session_id TEXT NOT NULL REFERENCES sessions (session_id),
    plugin TEXT NOT NULL,
    file TEXT,
    reason TEXT NOT NULL,
    fields TEXT NOT NULL CHECK (json_valid(fields)),
    status TEXT NOT NULL CHECK (status IN ('open', 'answered', 'withdrawn')),
    asked_at TEXT NOT NULL,
    answered_at TEXT,
    operator TEXT,
    answer TEXT CHECK (answer IS NULL OR json_valid(answer)),
    answer_digest TEXT,
    CHECK ((status = 'answered') = (answered_at IS NOT NULL))
) STRICT;
CREATE UNIQUE INDEX prompts_open ON prompts (session_id) WHERE status = 'open';
CREATE INDEX prompts_session ON prompts (session_id, asked_at);

CREATE TABLE snapshots (
    session_id TEXT NOT NULL REFERENCES sessions (session_id),
    ordinal INTEGER NOT NULL CHECK (ordinal >= 0),
    step TEXT NOT NULL,
    plugin TEXT,
    tree TEXT NOT NULL,
    manifest TEXT NOT NULL CHECK (length(manifest) = 64),
    taken_at TEXT NOT NULL,
    PRIMARY KEY (session_id, ordinal)
) STRICT, WITHOUT ROWID;

CREATE TABLE copy_jobs (
    session_id TEXT PRIMARY KEY REFERENCES sessions (session_id),
    source TEXT NOT NULL,
    target TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('pending', 'blocked_by_validation')),
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    next_at TEXT,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;

CREATE TABLE idempotency_keys (
    principal TEXT NOT NULL,
    key TEXT NOT NULL,
    body_digest TEXT NOT NULL CHECK (length(body_digest) = 64),
    session_id TEXT NOT NULL REFERENCES sessions (session_id),
    created_at TEXT NOT NULL,
    PRIMARY KEY (principal, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_session ON idempotency_keys (session_id);

CREATE TABLE audit (
    entry INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    principal TEXT NOT NULL,
    operator TEXT,
    command TEXT NOT NULL,
    session_id TEXT,
    trace_id TEXT NOT NULL,
    details TEXT NOT NULL CHECK (json_valid(details))
) STRICT;
CREATE INDEX audit_session ON audit (session_id);

CREATE TABLE log_lines (
    line INTEGER PRIMARY KEY AUTOINCREMENT,
    session_id TEXT NOT NULL REFERENCES sessions (session_id),
    at TEXT NOT NULL,
    source TEXT NOT NULL,
    level TEXT NOT NULL CHECK (level IN ('debug', 'info', 'warning', 'error')),
    text TEXT NOT NULL
) STRICT;
CREATE INDEX log_lines_session ON log_lines (session_id, line)
"""

TRIGGERS = (
    """
    CREATE TRIGGER sessions_begin BEFORE INSERT ON sessions
    WHEN NEW.state <> 'pending' OR NEW.head_seq <> 0 OR NEW.destination_key IS NOT NULL
        OR EXISTS (SELECT 1 FROM sessions WHERE session_id = NEW.session_id)
    BEGIN SELECT RAISE(ABORT, 'a session begins as pending, anew, without a history or a destination'); END
    """,
    """
    CREATE TRIGGER sessions_hold BEFORE UPDATE OF destination_key ON sessions
    WHEN EXISTS (SELECT 1 FROM sessions
                 WHERE destination_key = NEW.destination_key AND session_id <> NEW.session_id
                   AND state NOT IN ('done', 'failed', 'aborted'))
    BEGIN SELECT RAISE(ABORT, 'another live session holds this destination'); END
    """,
    """
    CREATE TRIGGER events_follow BEFORE INSERT ON events
    WHEN NEW.seq IS NOT (SELECT head_seq + 1 FROM sessions WHERE session_id = NEW.session_id)
        OR EXISTS (SELECT 1 FROM events WHERE position = NEW.position)
    BEGIN SELECT RAISE(ABORT, 'an event takes the next seq of its session, without a gap'); END
    """,
    """
    CREATE TRIGGER events_answer BEFORE INSERT ON events
    WHEN NEW.kind = 'input_received' AND NOT EXISTS (
        SELECT 1 FROM prompts WHERE session_id = NEW.session_id AND status = 'open'
            AND prompt_id = json_extract(NEW.frame, '$.prompt_id'))
    BEGIN SELECT RAISE(ABORT, 'an answer is to the open prompt of its session'); END
    """,
    """
    CREATE TRIGGER events_end BEFORE INSERT ON events
    WHEN EXISTS (SELECT 1 FROM sessions JOIN states USING (state)
                 WHERE session_id = NEW.session_id AND terminal = 1)
    BEGIN SELECT RAISE(ABORT, 'the history of a terminal session is closed'); END
    """,
    # What an event says is what happens to the row; the guards of sessions still have their say.
    """
    CREATE TRIGGER events_move AFTER INSERT ON events
    BEGIN
        INSERT INTO prompts (prompt_id, session_id, plugin, file, reason, fields, status, asked_at)
        SELECT json_extract(NEW.frame, '$.prompt_id'), NEW.session_id, json_extract(NEW.frame, '$.plugin'),
            json_extract(NEW.frame, '$.file'), json_extract(NEW.frame, '$.reason'),
            json_extract(NEW.frame, '$.fields'), 'open', NEW.at
        WHERE NEW.kind = 'input_required';
        UPDATE prompts SET
            status = iif(NEW.kind = 'failed', 'withdrawn', 'answered'),
            answered_at = iif(NEW.kind = 'failed', NULL, NEW.at),
            operator = json_extract(NEW.frame, '$.operator')
        WHERE session_id = NEW.session_id AND status = 'open' AND NEW.kind IN ('input_received', 'failed');
        UPDATE sessions SET
            head_seq = NEW.seq,
            updated_at = NEW.at,
            state = CASE NEW.kind
                WHEN 'phase' THEN coalesce(
                    (SELECT state FROM states
                     WHERE phase = json_extract(NEW.frame, '$.phase') AND terminal = 0
                       AND state <> 'input_required'), 'no such phase')
                WHEN 'input_required' THEN 'input_required'
                WHEN 'input_received' THEN 'plugin_pass'
                WHEN 'done' THEN 'done'
                WHEN 'failed' THEN
                    iif(json_extract(NEW.frame, '$.error.code') = 'cancelled', 'aborted', 'failed')
                ELSE state END,
            ended_at = iif(NEW.kind IN ('done', 'failed'), NEW.at, NULL),
            result = iif(NEW.kind = 'done', json_extract(NEW.frame, '$.result'), NULL),
            error = iif(NEW.kind = 'failed', json_extract(NEW.frame, '$.error'), NULL)
        WHERE session_id = NEW.session_id;
    END
    """,
    """
    CREATE TRIGGER sessions_move BEFORE UPDATE OF state ON sessions
    WHEN NEW.state <> OLD.state
    BEGIN
        SELECT RAISE(ABORT, 'illegal edge: a session moves along the table edges only')
        WHERE NOT EXISTS (SELECT 1 FROM edges WHERE from_state = OLD.state AND to_state = NEW.state);
        SELECT RAISE(ABORT, 'a session whose cancel is recorded can only be aborted')
        WHERE OLD.cancel_requested_at IS NOT NULL AND NEW.state <> 'aborted';
        SELECT RAISE(ABORT, 'a state is not assigned: insert the event that moves the session')
        WHERE NOT EXISTS (
            SELECT 1 FROM events JOIN states ON states.state = NEW.state
            WHERE session_id = NEW.session_id AND seq = NEW.head_seq AND seq = OLD.head_seq + 1
              AND CASE kind WHEN 'phase' THEN
                                OLD.state <> 'input_required' AND json_extract(frame, '$.phase') = states.phase
                            WHEN 'input_received' THEN NEW.state = 'plugin_pass'
                            WHEN 'failed' THEN NEW.state = iif(json_extract(frame, '$.error.code') = 'cancelled',
                                                               'aborted', 'failed')
                            ELSE kind = NEW.state END);
    END
    """,
    """
    CREATE TRIGGER sessions_head BEFORE UPDATE OF head_seq ON sessions
    WHEN NEW.head_seq IS NOT (SELECT max(seq) FROM events WHERE session_id = NEW.session_id)
    BEGIN SELECT RAISE(ABORT, 'head_seq is counted by the events, not assigned'); END
    """,
    """
    CREATE TRIGGER sessions_constant BEFORE UPDATE OF
        session_id, kind, run_kind, label, operator, equipment_id, template_path, created_at, retry_of, principal,
        trace_id, request ON sessions
    WHEN OLD.session_id IS NOT NEW.session_id OR OLD.kind IS NOT NEW.kind OR OLD.run_kind IS NOT NEW.run_kind
        OR OLD.label IS NOT NEW.label OR OLD.operator IS NOT NEW.operator
        OR OLD.equipment_id IS NOT NEW.equipment_id OR OLD.template_path IS NOT NEW.template_path
        OR OLD.created_at IS NOT NEW.created_at OR OLD.retry_of IS NOT NEW.retry_of
        OR OLD.principal IS NOT NEW.principal OR OLD.trace_id IS NOT NEW.trace_id OR OLD.request IS NOT NEW.request
    BEGIN SELECT RAISE(ABORT, 'what a session was asked for does not change'); END
    """,
    """
    CREATE TRIGGER sessions_pinned BEFORE UPDATE OF
        destination, destination_key, project_key, local_root, project_short_id, pinned ON sessions
    WHEN OLD.pinned IS NOT NULL AND (
        OLD.destination IS NOT NEW.destination OR OLD.destination_key IS NOT NEW.destination_key
        OR OLD.project_key IS NOT NEW.project_key OR OLD.local_root IS NOT NEW.local_root
        OR OLD.project_short_id IS NOT NEW.project_short_id OR OLD.pinned IS NOT NEW.pinned)
    BEGIN SELECT RAISE(ABORT, 'what a session works with is pinned'); END
    """,
    """
    CREATE TRIGGER sessions_ended BEFORE UPDATE OF
        tree, rendered, findings, blocked_on, cancel_requested_at, cancel, error, result, ended_at ON sessions
    WHEN OLD.state IN ('done', 'failed', 'aborted') AND (
        OLD.tree IS NOT NEW.tree OR OLD.rendered IS NOT NEW.rendered OR OLD.findings IS NOT NEW.findings
        OR OLD.blocked_on IS NOT NEW.blocked_on
        OR OLD.cancel_requested_at IS NOT NEW.cancel_requested_at OR OLD.cancel IS NOT NEW.cancel
        OR OLD.error IS NOT NEW.error OR OLD.result IS NOT NEW.result OR OLD.ended_at IS NOT NEW.ended_at)
    BEGIN SELECT RAISE(ABORT, 'a terminal session does not change'); END
    """,
    """
    CREATE TRIGGER sessions_cancel BEFORE UPDATE OF cancel_requested_at ON sessions
    WHEN NEW.cancel_requested_at IS NOT OLD.cancel_requested_at
        AND (OLD.cancel_requested_at IS NOT NULL
             OR NOT EXISTS (SELECT 1 FROM edges WHERE from_state = OLD.state AND to_state = 'aborted'))
    BEGIN SELECT RAISE(ABORT, 'a cancel is recorded once, and before the session is committed to publishing'); END
    """,
    """
    CREATE TRIGGER sessions_prune BEFORE DELETE ON sessions
    WHEN OLD.state NOT IN ('done', 'failed', 'aborted')
    BEGIN SELECT RAISE(ABORT, 'only a terminal session can be pruned'); END
    """,
    """
    CREATE TRIGGER sessions_pruned AFTER DELETE ON sessions
    BEGIN
        DELETE FROM events WHERE session_id = OLD.session_id;
        DELETE FROM prompts WHERE session_id = OLD.session_id;
        DELETE FROM snapshots WHERE session_id = OLD.session_id;
        DELETE FROM copy_jobs WHERE session_id = OLD.session_id;
        DELETE FROM idempotency_keys WHERE session_id = OLD.session_id;
        DELETE FROM log_lines WHERE session_id = OLD.session_id;
    END
    """,
    """
    CREATE TRIGGER events_constant BEFORE UPDATE ON events
    BEGIN SELECT RAISE(ABORT, 'an event does not change'); END
    """,
    """
    CREATE TRIGGER events_kept BEFORE DELETE ON events
    WHEN EXISTS (SELECT 1 FROM sessions WHERE session_id = OLD.session_id)
    BEGIN SELECT RAISE(ABORT, 'events go only with their whole terminal session'); END
    """,
    """
    CREATE TRIGGER prompts_asked BEFORE INSERT ON prompts
    WHEN NEW.status <> 'open'
        OR EXISTS (SELECT 1 FROM prompts WHERE prompt_id = NEW.prompt_id
                   OR (session_id = NEW.session_id AND status = 'open'))
        OR NOT EXISTS (
            SELECT 1 FROM events WHERE session_id = NEW.session_id AND kind = 'input_required'
                AND seq = (SELECT max(seq) FROM events WHERE session_id = NEW.session_id)
                AND json_extract(frame, '$.prompt_id') = NEW.prompt_id)
    BEGIN SELECT RAISE(ABORT, 'a prompt is not assigned: insert the event that asks'); END
    """,
    """
    CREATE TRIGGER prompts_closed BEFORE UPDATE OF status ON prompts
    WHEN NEW.status <> OLD.status AND NOT EXISTS (
        SELECT 1 FROM events WHERE session_id = NEW.session_id
            AND seq = (SELECT max(seq) FROM events WHERE session_id = NEW.session_id)
            AND CASE NEW.status
                WHEN 'answered' THEN
                    kind = 'input_received' AND json_extract(frame, '$.prompt_id') = NEW.prompt_id
                ELSE kind = 'failed' END)
    BEGIN SELECT RAISE(ABORT, 'a prompt is not closed by hand: insert the event that tells of it'); END
    """,
    """
    CREATE TRIGGER prompts_kept BEFORE DELETE ON prompts
    WHEN EXISTS (SELECT 1 FROM sessions WHERE session_id = OLD.session_id)
    BEGIN SELECT RAISE(ABORT, 'a prompt goes with its session only'); END
    """,
    """
    CREATE TRIGGER prompts_constant BEFORE UPDATE ON prompts
    WHEN OLD.status <> 'open' OR NEW.prompt_id <> OLD.prompt_id OR NEW.session_id <> OLD.session_id
        OR NEW.fields <> OLD.fields OR NEW.plugin <> OLD.plugin OR NEW.reason <> OLD.reason
    BEGIN SELECT RAISE(ABORT, 'a prompt is answered once, and its question does not change'); END
    """,
    """
    CREATE TRIGGER audit_added BEFORE INSERT ON audit
    WHEN EXISTS (SELECT 1 FROM audit WHERE entry = NEW.entry)
    BEGIN SELECT RAISE(ABORT, 'the audit is only added to'); END
    """,
    """
    CREATE TRIGGER audit_constant BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit does not change'); END
    """,
    """
    CREATE TRIGGER audit_kept BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit is kept'); END
    """,
    *(
        f"""
        CREATE TRIGGER {table}_{verb.split()[0].lower()} BEFORE {verb} ON {table}
        BEGIN SELECT RAISE(ABORT, 'the {table} are part of the schema'); END
        """
        for table in ("states", "edges")
        for verb in ("INSERT", "UPDATE", "DELETE")
    ),
)

VIEWS = (
    """
    CREATE VIEW live_sessions AS
    SELECT s.session_id, kind, run_kind, s.state, coalesce(t.phase, s.state) AS phase, label, s.operator,
        equipment_id,
        project_short_id,
        CASE WHEN s.cancel_requested_at IS NOT NULL THEN 'cancel: its processes are being stopped'
             WHEN s.blocked_on IS NOT NULL THEN 'blocked: ' || json_extract(s.blocked_on, '$.message')
             WHEN p.prompt_id IS NOT NULL THEN 'operator: ' || p.plugin || ' asks: ' || p.reason
             ELSE 'nothing: a step is running or next in turn' END AS waits_for,
        round((julianday('now') - julianday(s.created_at)) * 86400, 1) AS age_seconds,
        round((julianday('now') - julianday(s.updated_at)) * 86400, 1) AS quiet_seconds,
        recoveries, destination, s.created_at, s.updated_at
    FROM sessions s JOIN states t USING (state)
    LEFT JOIN prompts p ON p.session_id = s.session_id AND p.status = 'open'
    WHERE t.terminal = 0
    ORDER BY s.session_id
    """,
    """
    CREATE VIEW finished_sessions AS
    SELECT session_id, kind, run_kind, state, label, operator, equipment_id, project_short_id, created_at, ended_at,
        round((julianday(ended_at) - julianday(created_at)) * 86400, 3) AS took_seconds,
        json_extract(error, '$.code') AS error_code, json_extract(error, '$.message') AS error_message,
        json_extract(error, '$.field') AS error_field, destination, partial_path, sync_status, retry_of
    FROM sessions WHERE state IN ('done', 'failed', 'aborted')
    ORDER BY ended_at DESC
    """,
    """
    CREATE VIEW timeline AS
    SELECT session_id, seq, at, kind,
        CASE kind
            WHEN 'phase' THEN json_extract(frame, '$.phase')
            WHEN 'progress' THEN json_extract(frame, '$.current') || ' of ' || json_extract(frame, '$.total')
            WHEN 'input_required' THEN
                json_extract(frame, '$.plugin') || ' asks: ' || json_extract(frame, '$.reason')
            WHEN 'input_received' THEN 'answered: ' || json_extract(frame, '$.plugin')
            WHEN 'warning' THEN json_extract(frame, '$.code') || ': ' || json_extract(frame, '$.message')
            WHEN 'recovered' THEN 'taken up again in ' || json_extract(frame, '$.state')
            WHEN 'done' THEN 'published as ' || json_extract(frame, '$.result.path')
            WHEN 'failed' THEN
                json_extract(frame, '$.error.code') || ': ' || json_extract(frame, '$.error.message')
        END AS what,
        round((julianday(at) - julianday(lag(at) OVER (PARTITION BY session_id ORDER BY seq))) * 86400, 3)
            AS seconds_since_previous
    FROM events ORDER BY session_id, seq
    """,
    """
    CREATE VIEW open_prompts AS
    SELECT prompt_id, session_id, plugin, file, reason, json_array_length(p.fields) AS fields_asked, label, operator,
        equipment_id, project_short_id, asked_at,
        round((julianday('now') - julianday(asked_at)) * 86400, 1) AS waiting_seconds
    FROM (SELECT prompt_id, session_id, plugin, file, reason, fields, asked_at FROM prompts WHERE status = 'open') p
    JOIN sessions USING (session_id)
    ORDER BY asked_at
    """,
    """
    CREATE VIEW copies AS
    SELECT session_id, status, label, equipment_id, project_short_id, source, target, attempts, c.error, next_at,
        c.created_at, round((julianday('now') - julianday(c.created_at)) * 86400, 1) AS waiting_seconds
    FROM copy_jobs c JOIN sessions s USING (session_id)
    ORDER BY c.created_at
    """,
)


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        op.execute(statement)
    connection = op.get_bind()
    connection.exec_driver_sql("INSERT INTO states (state, phase, terminal) VALUES (?, ?, ?)", list(STATES))
    connection.exec_driver_sql("INSERT INTO edges (from_state, to_state) VALUES (?, ?)", list(EDGES))
    # Only now: the guards of the tables of states and edges close them for good.
    for statement in (*TRIGGERS, *VIEWS):
        connection.exec_driver_sql(statement)


def downgrade() -> None:
    raise RuntimeError("the store goes back by its backup, not by a downgrade")
