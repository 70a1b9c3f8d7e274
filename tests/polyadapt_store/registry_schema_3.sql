CREATE TABLE adapters (
  tenant TEXT NOT NULL,
  name TEXT NOT NULL,
  current_version INTEGER,
  last_version INTEGER NOT NULL,
  PRIMARY KEY (tenant, name)
);
CREATE TABLE workflows (
  tenant TEXT NOT NULL,
  name TEXT NOT NULL,
  id TEXT NOT NULL,
  version INTEGER NOT NULL,
  created INTEGER NOT NULL,
  updated INTEGER NOT NULL,
  description TEXT NOT NULL,
  definition TEXT,
  PRIMARY KEY (tenant, name),
  UNIQUE (id)
);
CREATE TABLE profile_spaces (
  space TEXT NOT NULL,
  content BLOB NOT NULL,
  PRIMARY KEY (space)
);
CREATE TABLE policies (
  tenant TEXT NOT NULL,
  created INTEGER NOT NULL,
  PRIMARY KEY (tenant)
);
CREATE TABLE signatures (
  digest TEXT NOT NULL,
  user TEXT NOT NULL,
  generation INTEGER NOT NULL,
  bits TEXT NOT NULL,
  issued_at INTEGER NOT NULL,
  revoked_at INTEGER,
  PRIMARY KEY (digest, user, generation)
);
CREATE TABLE api_keys (
  id TEXT NOT NULL,
  hash BLOB NOT NULL,
  tenant TEXT NOT NULL,
  label TEXT NOT NULL,
  scopes TEXT NOT NULL,
  created INTEGER NOT NULL,
  PRIMARY KEY (id),
  UNIQUE (hash)
);
CREATE TABLE adapter_versions (
  id TEXT NOT NULL,
  tenant TEXT NOT NULL,
  name TEXT NOT NULL,
  version INTEGER NOT NULL,
  digest TEXT NOT NULL,
  base_digest TEXT NOT NULL,
  status TEXT NOT NULL,
  created INTEGER NOT NULL,
  description TEXT NOT NULL,
  manifest TEXT NOT NULL,
  PRIMARY KEY (id),
  UNIQUE (tenant, name, version),
  FOREIGN KEY(tenant, name) REFERENCES adapters (tenant, name),
  CHECK (status IN ('ready', 'revoked', 'deleted'))
);
CREATE INDEX ix_adapter_versions_digest ON adapter_versions (digest);
CREATE TABLE adapter_profiles (
  tenant TEXT NOT NULL,
  name TEXT NOT NULL,
  space TEXT NOT NULL,
  base_digest TEXT NOT NULL,
  examples TEXT NOT NULL,
  num_centroids INTEGER NOT NULL,
  centroids BLOB NOT NULL,
  own_scores TEXT NOT NULL,
  created INTEGER NOT NULL,
  PRIMARY KEY (tenant, name),
  FOREIGN KEY(tenant, name) REFERENCES adapters (tenant, name)
);
CREATE TABLE adapter_tags (
  version_id TEXT NOT NULL,
  tag TEXT NOT NULL,
  PRIMARY KEY (version_id, tag),
  FOREIGN KEY(version_id) REFERENCES adapter_versions (id)
);
CREATE TABLE policy_adapters (
  tenant TEXT NOT NULL,
  position INTEGER NOT NULL,
  version_id TEXT NOT NULL,
  scale FLOAT NOT NULL,
  rank INTEGER,
  options TEXT NOT NULL,
  PRIMARY KEY (tenant, position),
  FOREIGN KEY(tenant) REFERENCES policies (tenant),
  FOREIGN KEY(version_id) REFERENCES adapter_versions (id)
);
CREATE INDEX ix_policy_adapters_version_id ON policy_adapters (version_id);
