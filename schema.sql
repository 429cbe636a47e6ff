-- Image embeddings of products: run this file in Supabase's SQL editor, or with psql. It needs
-- pgvector 0.8 or later, runs as a whole or not at all, and running it again does no harm.
--
-- Made for a table   public.assets (id uuid primary key, image_url text, client_name text).
-- Yours differs? The section "Your tables" is the only one that names it. Are your ids bigint or
-- text? Replace the word uuid by that in the whole file. A table product_embeddings that is there
-- already is kept; from then on the service role alone may use it (see "Access").

begin;
set local search_path = public, extensions;
set local lock_timeout = '10s';  -- an app's long transaction ends this file, not the app's work

-- Older projects have pgvector in public, and there it stays.
do $$ begin
  if to_regnamespace('extensions') is null then create schema extensions; end if;
end $$;
create extension if not exists vector with schema extensions;

do $$
declare
  version text := (select extversion from pg_extension where extname = 'vector');
  old text;
begin
  if string_to_array(version, '.')::int[] < '{0,8}' then
    raise exception 'pgvector % is too old, this needs 0.8.0 or later', version using hint =
      'Run: alter extension vector update; if that brings no newer one, upgrade the project '
      '(Settings > Infrastructure).';
  end if;
  -- Loads pgvector: until then only a superuser may give a function settings that begin with hnsw.
  perform '[1]'::vector;
  -- What older versions of this file made.
  for old in
    select format('drop function %s %s', p.oid::regprocedure,
                  case when p.prorettype = 'trigger'::regtype then 'cascade' else '' end)
    from pg_proc p
    where p.pronamespace = 'public'::regnamespace
      and (p.proname in ('forget_asset_embedding', 'await_image_change', 'clear_embedding_failure',
                         'skip_embedding_failure', 'count_embedding_attempt')
           and p.prorettype = 'trigger'::regtype
           or p.proname = 'match_products' and p.proargnames = '{query_embedding, match_count, '
                'client, model_version, asset_id, image_url, similarity}'
           or p.proname = 'similar_products' and p.proargnames = '{asset_id, match_count, '
                'asset_id, image_url, similarity}')
  loop
    execute old;
  end loop;
end $$;

-- The trigger below needs a function; its body stands further down.
create or replace function public.forget_embedding() returns trigger
language plpgsql as 'begin return null; end';

-- Your tables ----------------------------------------------------------------------------------

-- What the script embeds: an id, an image (a URL, or a data: URL) and a client's name, both text.
-- Assets that this leaves out are left alone.
create or replace view public.embedding_sources with (security_invoker = true) as
  select a.id, a.image_url as image, a.client_name as client
  from public.assets a;

-- The search functions read the assets with the rights of whoever calls them.
grant select on public.assets to service_role;

-- A deleted asset takes its rows along: what asset_id refers to.
set local embeddings.assets = 'public.assets (id)';

-- A new image: forget what is known of the old one. The column that holds it, twice, and the name
-- of the id's column.
create or replace trigger forget_embedding
  after update on public.assets
  for each row when (old.image_url is distinct from new.image_url)
  execute function public.forget_embedding('id');

-- Other names: change them above. Other shapes, each to take the place of the view's select:
--
-- Clients in a table of their own (grant select on that one, too). A subquery and no join, because
-- store_embeddings locks a row of every table that is joined here, and cannot lock an outer join:
--   select a.id, a.image_url as image,
--     (select c.name from public.clients c where c.id = a.client_id) as client
--   from public.assets a;
-- No clients at all:
--   select a.id, a.image_url as image, null::text as client from public.assets a;
-- Only what is published:
--   select a.id, a.image_url as image, a.client_name as client from public.assets a
--   where a.published;
-- A path made a URL (the trigger then watches image_path):
--   select a.id, 'https://cdn.example.com/' || a.image_path as image, a.client_name as client
--   from public.assets a;
--
-- Many clients? Searching one client's products wants an index on that column:
--   create index on public.assets (client_name);

-- Tables ---------------------------------------------------------------------------------------

-- One vector of unit length per asset. A row of another model_version counts as missing.
create table if not exists public.product_embeddings (
  asset_id uuid primary key,
  embedding vector(512) not null,
  model_version text not null,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);

-- Why an asset has no embedding. Permanent failures (404, not an image, ...) are not tried again.
create table if not exists public.product_embedding_failures (
  asset_id uuid primary key,
  model_version text not null,
  stage text not null,
  reason text not null,
  permanent boolean not null,
  attempts int not null default 1,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);

-- A product_embeddings table from before this file may lack what the functions below rely on.
alter table public.product_embeddings
  alter column created_at set default now(),
  alter column updated_at set default now();

do $$
declare
  relation regclass;
begin
  if (select atttypmod from pg_attribute where attname = 'embedding'
      and attrelid = 'public.product_embeddings'::regclass) <> 512 then
    raise exception 'product_embeddings.embedding is no vector(512)' using hint =
      'Put the old table aside and run this file again: '
      'alter table public.product_embeddings rename to product_embeddings_old; '
      'or, where its vectors do have 512 numbers: '
      'alter table public.product_embeddings alter column embedding '
      'type vector(512);';
  end if;

  if not exists (
    select from pg_index i join pg_attribute a on a.attrelid = i.indrelid
    where i.indrelid = 'public.product_embeddings'::regclass and a.attname = 'asset_id'
      and i.indisunique and i.indpred is null and i.indkey::text = a.attnum::text
  ) then
    if exists (select from product_embeddings group by asset_id having count(*) > 1) then
      raise exception 'product_embeddings has several rows for one asset_id' using hint =
        'Keep the newest of each and run this file again: '
        'delete from public.product_embeddings a using public.product_embeddings b '
        'where a.asset_id = b.asset_id and (a.updated_at, a.ctid) < (b.updated_at, b.ctid);';
    end if;
    create unique index product_embeddings_asset_id on product_embeddings (asset_id);
  end if;

  -- Not valid: it holds for new rows, and an old table's orphans do no harm.
  foreach relation in array '{product_embeddings, product_embedding_failures}'::regclass[] loop
    if not exists (
      select from pg_constraint c join pg_attribute a on a.attrelid = c.conrelid
      where c.conrelid = relation and c.contype = 'f' and c.conkey = array[a.attnum]
        and a.attname = 'asset_id'
    ) then
      execute format('alter table %s add foreign key (asset_id) references %s on delete cascade '
                     'not valid', relation, current_setting('embeddings.assets'));
    end if;
  end loop;

  -- On a large table this takes longer than the SQL editor waits, and would keep the app waiting.
  if not exists (
    select from pg_index i join pg_opclass o on o.oid = i.indclass[0]
    where i.indrelid = 'public.product_embeddings'::regclass and i.indisvalid
      and o.opcname = 'vector_cosine_ops' and o.opcmethod = (select oid from pg_am
                                                             where amname = 'hnsw')
  ) then
    if (select count(*) from (select from product_embeddings limit 10001) as few) > 10000 then
      raise warning 'product_embeddings has no HNSW index: create it as schema.sql says';
    else
      create index product_embeddings_embedding_hnsw
        on product_embeddings using hnsw (embedding vector_cosine_ops);
    end if;
  end if;
end $$;

-- Millions of rows to load for the first time? Without the index that goes quicker:
--   drop index public.product_embeddings_embedding_hnsw;
-- and then by psql over the direct connection, not the pooler (the SQL editor gives up too soon):
--   set statement_timeout = 0;
--   set maintenance_work_mem = '4GB';  -- a million rows; it must be there
--   set max_parallel_maintenance_workers = 0;  -- needed before pgvector 0.8.2 (CVE-2026-3172)
--   create index concurrently product_embeddings_embedding_hnsw
--     on public.product_embeddings using hnsw (embedding vector_cosine_ops);
-- The index takes about 4 KB of disk a row, as much as the table.

-- Access: the service role alone. It bypasses row level security, and there is no policy, which is
-- meant so (the advisor's notice 0008).
alter table public.product_embeddings enable row level security;
alter table public.product_embedding_failures enable row level security;
revoke all on public.embedding_sources, public.product_embeddings, public.product_embedding_failures
  from public, anon, authenticated;
grant select on public.embedding_sources to service_role;
grant select, insert, update, delete
  on public.product_embeddings, public.product_embedding_failures to service_role;

-- For the script -------------------------------------------------------------------------------
--
-- Security definer: they read and write as their owner, so the service role needs no grant.
-- force_custom_plan: which parameters are null decides what a good plan is.

-- How long a failure for now rests before it is tried again: after the first not at all, then 1, 3,
-- 7, ... hours, a week at most. One step longer where an image used up the whole time it is given:
-- a host that answers so has each run spend that time on each of its images, and a second run
-- right after the first would only spend it again. (These are the words of
-- generate_embeddings.py.) Strict: embedding_status asks for every asset, and most have not failed.
create or replace function public.embedding_back_off(attempts int, reason text) returns interval
language plpgsql immutable strict parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  steps int := least(attempts, 9) + (reason ^@ 'not complete within')::int;
begin
  return (least(power(2, steps - 1), 169) - 1) * interval '1 hour';
end $$;

-- What there is of one client and shard, counted exactly; "waiting" are those that failed for now
-- and are not due again yet. A failure row says more than a vector beside it: see
-- forget_embedding.
create or replace function public.embedding_status(
  model_version text, client text default null, shard int default 1, shards int default 1
) returns jsonb
language plpgsql stable security definer
set search_path = public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
set statement_timeout = '55s'
as $$
#variable_conflict use_column
begin
  return (
    select jsonb_build_object(
      'contract', 1,  -- CONTRACT in generate_embeddings.py
      'dimensions', (select atttypmod from pg_attribute where attname = 'embedding'
                     and attrelid = 'public.product_embeddings'::regclass),
      'time', now(),
      'client_exists', embedding_status.client is null or exists (
        select from embedding_sources c where c.client = embedding_status.client),
      'assets', count(*),
      'done', count(*) filter (where e.asset_id is not null and f.asset_id is null),
      'failed_for_now', count(*) filter (where not f.permanent),
      'waiting', count(*) filter (where not f.permanent and f.updated_at
        + embedding_back_off(f.attempts, f.reason) >= now()),
      'failed_for_good', count(*) filter (where f.permanent))
    from embedding_sources s
    left join product_embeddings e
      on e.asset_id = s.id and e.model_version = embedding_status.model_version
    left join product_embedding_failures f
      on f.asset_id = s.id and f.model_version = embedding_status.model_version
    where (embedding_status.client is null or s.client = embedding_status.client)
      and (shards = 1
           or (hashtextextended(s.id::text, 0) & 9223372036854775807) % shards = shard - 1));
end $$;

-- The next assets to embed after an id: new ones, or those that failed before a moment (and are due
-- again: see embedding_back_off). One JSON value, as the API cuts a list of rows at 1,000. At most
-- 8 MB of images at once, for some are data: URLs; one that is larger by itself comes cut short.
-- Ids first, so that no image is read before it is known which ones fit.
create or replace function public.pending_assets(
  model_version text, client text default null, after uuid default null, wanted int default 250,
  failed_before timestamptz default null, permanent_too boolean default false,
  shard int default 1, shards int default 1
) returns jsonb
language plpgsql stable security definer
set search_path = public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
set statement_timeout = '55s'
as $$
#variable_conflict use_column
declare
  most constant int := 8000000;
  ids uuid[];
begin
  if failed_before is null then
    ids := array(
      select s.id from embedding_sources s
      where (pending_assets.client is null or s.client = pending_assets.client)
        and (after is null or s.id > after)
        and (shards = 1
             or (hashtextextended(s.id::text, 0) & 9223372036854775807) % shards = shard - 1)
        and not exists (
          select from product_embeddings e
          where e.asset_id = s.id and e.model_version = pending_assets.model_version)
        and not exists (
          select from product_embedding_failures f
          where f.asset_id = s.id and f.model_version = pending_assets.model_version)
      order by s.id limit wanted);
  else
    ids := array(
      select s.id from product_embedding_failures f join embedding_sources s on s.id = f.asset_id
      where f.model_version = pending_assets.model_version
        and f.updated_at < failed_before
        and (permanent_too or not f.permanent and f.updated_at
          + embedding_back_off(f.attempts, f.reason) < failed_before)
        and (pending_assets.client is null or s.client = pending_assets.client)
        and (after is null or s.id > after)
        and (shards = 1
             or (hashtextextended(s.id::text, 0) & 9223372036854775807) % shards = shard - 1)
      order by s.id limit wanted);
  end if;

  return (
    with sized as (
      select s.id, coalesce(octet_length(s.image), 0) as bytes
      from embedding_sources s where s.id = any (ids)
    ), summed as (
      select id, bytes,
        sum(case when bytes > most then most / 8 else bytes end) over (order by id) as total
      from sized
    ), page as (
      select p.id, p.bytes, s.image
      from summed p join embedding_sources s on s.id = p.id
      where p.total <= most
    )
    select jsonb_build_object(
      'assets', coalesce(jsonb_agg(jsonb_build_object(
        'id', id, 'image', case when bytes > most then left(image, 100) else image end,
        'image_hash', hashtextextended(coalesce(image, ''), 0), 'bytes', bytes
      ) order by id), '[]'),
      'last', case when count(*) = wanted or count(*) < cardinality(ids)
                   then (array_agg(id order by id desc))[1] end)
    from page);
end $$;

-- One batch, or one row of it: what store_embeddings does, without its care for a row that fails.
-- Planned without the values (force_generic_plan), and the vectors are read once: each further look
-- at the whole batch costs as much as storing a few of its rows. A row takes its outcome along from
-- where it is known: looking it up again for the answer costs as much.
create or replace function public.store_embedding_rows(
  model_version text, vectors json, failures json
) returns jsonb
language plpgsql
set search_path = public, extensions, pg_temp
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  ids uuid[];
  outcomes text[];
  written uuid[];
  due uuid[];  -- failures of assets that could be locked and have not changed
  noted uuid[];
begin
  -- No transaction of the app, and no other worker, changes the locked assets until ours is over.
  -- This statement locks and overwrites what is newest, whatever it saw; the statements after it
  -- see what was there when the lock was taken.
  with given as materialized (
    select v.*, false as failed
    from json_to_recordset(vectors) v (asset_id uuid, image_hash bigint, embedding vector)
    union all
    select f.asset_id, f.image_hash, null, true
    from json_to_recordset(failures) f (asset_id uuid, image_hash bigint)
  ), locked as materialized (
    select s.id, hashtextextended(coalesce(s.image, ''), 0) as image_hash
    from embedding_sources s where s.id = any (array(select g.asset_id from given g))
    order by s.id for no key update skip locked
  ), stored as (
    insert into product_embeddings as e (asset_id, embedding, model_version)
    select g.asset_id, g.embedding, store_embedding_rows.model_version from given g
    where not g.failed and (g.asset_id, g.image_hash) in (select l.id, l.image_hash from locked l)
    on conflict (asset_id) do update set
      embedding = excluded.embedding, model_version = excluded.model_version, updated_at = now()
    returning e.asset_id
  ), seen as materialized (
    select g.asset_id, case
      when (g.asset_id, g.image_hash) in (select l.id, l.image_hash from locked l) then case
        when g.failed then 'due'
        when g.asset_id in (select s.asset_id from stored s) then 'stored'
        else 'refused' end
      when g.asset_id not in (select l.id from locked l) then 'not locked'
      else 'changed' end as outcome
    from given g
  )
  select array_agg(asset_id), array_agg(outcome),
    array_agg(asset_id) filter (where outcome = 'stored'),
    array_agg(asset_id) filter (where outcome = 'due')
  into ids, outcomes, written, due
  from seen;
  delete from product_embedding_failures f where f.asset_id = any (written);

  if due is not null then
    -- A vector with a failure beside it is of an older image: see forget_embedding.
    delete from product_embeddings e using product_embedding_failures f
    where e.asset_id = any (due) and e.model_version = store_embedding_rows.model_version
      and f.asset_id = e.asset_id and f.model_version = store_embedding_rows.model_version;

    with recorded as (
      insert into product_embedding_failures as f
        (asset_id, model_version, stage, reason, permanent)
      select r.asset_id, store_embedding_rows.model_version, r.stage, r.reason, r.permanent
      from json_to_recordset(failures)
        r (asset_id uuid, stage text, reason text, permanent boolean)
      where r.asset_id = any (due)
        and not exists (
          select from product_embeddings e where e.asset_id = r.asset_id
          and e.model_version = store_embedding_rows.model_version)
      on conflict (asset_id) do update set
        model_version = excluded.model_version, stage = excluded.stage, reason = excluded.reason,
        permanent = excluded.permanent, updated_at = now(),
        attempts = case when f.model_version = excluded.model_version then f.attempts else 0 end + 1
      returning f.asset_id
    )
    select array_agg(asset_id) into noted from recorded;
  end if;

  return (
    select coalesce(jsonb_agg(case
      when outcome = 'refused' then jsonb_build_object(
        'asset_id', asset_id, 'outcome', outcome, 'reason', 'a trigger left the row out')
      else jsonb_build_object('asset_id', asset_id, 'outcome', outcome) end), '[]')
    from (
      select g.asset_id, case
        when g.outcome = 'not locked' then case when exists (
          select from embedding_sources s where s.id = g.asset_id) then 'busy' else 'deleted' end
        when g.outcome <> 'due' then g.outcome
        when g.asset_id = any (noted) then 'noted'
        when exists (
          select from product_embeddings e where e.asset_id = g.asset_id
          and e.model_version = store_embedding_rows.model_version) then 'superseded'
        else 'refused' end as outcome
      from unnest(ids, outcomes) g (asset_id, outcome)
    ) answers);
end $$;

-- Stores vectors and records failures, in one transaction, and says of each row what became of it:
-- stored, noted, superseded (a failure, but there is a vector), deleted, changed (the image),
-- busy (somebody holds the asset or its row: never waited for), refused (with the reason). A row
-- that the database refuses costs itself alone. Other errors end the call, with nothing stored.
-- Of json and not jsonb: a batch is taken in quicker.
create or replace function public.store_embeddings(
  model_version text, vectors json default '[]', failures json default '[]'
) returns jsonb
language plpgsql security definer
set search_path = public, extensions, pg_temp
set statement_timeout = '55s'
set lock_timeout = '2s'
as $$
declare
  answers jsonb := '[]';
  single record;
begin
  begin
    return store_embedding_rows(model_version, vectors, failures);
  exception when data_exception or integrity_constraint_violation or cardinality_violation
    or with_check_option_violation or plpgsql_error or lock_not_available then
  end;

  perform set_config('lock_timeout', '50ms', true);  -- in this call: each row may have to wait
  for single in
    select value as asset, json_build_array(value) as vector, json '[]' as failure
    from json_array_elements(vectors)
    union all
    select value, '[]', json_build_array(value) from json_array_elements(failures)
  loop
    begin
      answers := answers || store_embedding_rows(model_version, single.vector, single.failure);
    exception
      when lock_not_available then
        answers := answers || jsonb_build_object(
          'asset_id', single.asset -> 'asset_id', 'outcome', 'busy');
      when data_exception or integrity_constraint_violation or cardinality_violation
        or with_check_option_violation or plpgsql_error then
        answers := answers || jsonb_build_object(
          'asset_id', single.asset -> 'asset_id', 'outcome', 'refused', 'reason', sqlerrm);
    end;
  end loop;
  return answers;
end $$;

-- The body of the trigger. Security definer, because who edits an asset has no rights on our
-- tables. It neither fails nor waits: where the vector cannot be deleted just now (an index is
-- being built), it gets a failure row at its side, and the next run embeds the asset anew.
create or replace function public.forget_embedding() returns trigger
language plpgsql security definer
set search_path = public, extensions, pg_temp
set lock_timeout = '250ms'
as $$
declare
  asset uuid;
begin
  execute format('select ($1).%I', tg_argv[0]) into asset using new;
  delete from product_embedding_failures f where f.asset_id = asset;
  lock table product_embeddings in row exclusive mode nowait;
  delete from product_embeddings e where e.asset_id = asset;
  return null;
exception
  when lock_not_available then
    begin
      delete from product_embedding_failures f where f.asset_id = asset;
      insert into product_embedding_failures (asset_id, model_version, stage, reason, permanent)
      select e.asset_id, e.model_version, 'store', 'the image changed while its row was locked',
        false
      from product_embeddings e where e.asset_id = asset;
    exception when others then
      raise warning 'the embedding of asset % was not forgotten: %', asset, sqlerrm;
    end;
    return null;
  when others then
    raise warning 'the embedding of asset % was not forgotten: %', asset, sqlerrm;
    return null;
end $$;

-- Search ---------------------------------------------------------------------------------------

-- The assets whose images are nearest to a vector, nearest first; similarity is the cosine, 1 at
-- most. client and model_version narrow the search where they are given. 1,000 matches at most.
--
-- force_custom_plan: the planner must see the client to choose between the HNSW index and, for a
-- client with few assets, an exact sort of those. iterative_scan: a filtered or long search goes on
-- in the index until there are enough rows, or max_scan_tuples have been looked at: a client whose
-- products are rarer than that among those near the vector may get fewer.
create or replace function public.match_products(
  query_embedding vector(512), match_count int default 10, client text default null,
  model_version text default null
) returns table (asset_id uuid, image text, similarity float8)
language plpgsql stable
set search_path = public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
set hnsw.iterative_scan = strict_order
set hnsw.max_scan_tuples = 40000
set hnsw.scan_mem_multiplier = 4
as $$
#variable_conflict use_column
begin
  return query
    select e.asset_id, s.image, 1 - (e.embedding <=> query_embedding)
    from product_embeddings e join embedding_sources s on s.id = e.asset_id
    where (match_products.client is null or s.client = match_products.client)
      and (match_products.model_version is null or e.model_version = match_products.model_version)
    order by e.embedding <=> query_embedding
    limit least(match_count, 1000);
end $$;

-- The assets that look most like this one, without itself; none if it has no embedding yet.
create or replace function public.similar_products(
  asset_id uuid, match_count int default 10, client text default null
) returns table (asset_id uuid, image text, similarity float8)
language sql stable
set search_path = public, extensions, pg_temp
as $$
  select m.asset_id, m.image, m.similarity
  from product_embeddings e
  cross join lateral match_products(
    e.embedding, least(similar_products.match_count, 1000) + 1, similar_products.client,
    e.model_version) m
  where e.asset_id = similar_products.asset_id and m.asset_id <> e.asset_id
  order by m.similarity desc
  limit similar_products.match_count
$$;

-- Pairs of assets that look the same, among the nearest few of each asset of one page; go on with
-- "last" as the next page's after, until it is null. A pair comes once, at its smaller id; of a
-- group larger than neighbours not every pair comes.
create or replace function public.duplicate_products(
  min_similarity float8 default 0.97, client text default null, after uuid default null,
  page int default 1000, neighbours int default 5
) returns jsonb
language plpgsql stable
set search_path = public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
set statement_timeout = '55s'
as $$
#variable_conflict use_column
declare
  ids uuid[] := array(
    select e.asset_id from product_embeddings e join embedding_sources s on s.id = e.asset_id
    where (duplicate_products.client is null or s.client = duplicate_products.client)
      and (after is null or e.asset_id > after)
    order by e.asset_id limit page);
begin
  return (
    select jsonb_build_object(
      'pairs', coalesce(jsonb_agg(jsonb_build_object(
        'asset_id', e.asset_id, 'image', s.image, 'duplicate_id', m.asset_id,
        'duplicate_image', m.image, 'similarity', m.similarity
      ) order by e.asset_id, m.similarity desc), '[]'),
      'last', case when cardinality(ids) = page then ids[page] end)
    from product_embeddings e join embedding_sources s on s.id = e.asset_id
    cross join lateral match_products(
      e.embedding, neighbours + 1, duplicate_products.client, e.model_version) m
    where e.asset_id = any (ids) and m.asset_id > e.asset_id and m.similarity >= min_similarity);
end $$;

-- What --gallery shows, in rows of [id, image, similarity to the first of the row]. "near": some
-- assets, spread over the clients, each with its nearest; "pairs": the most alike that a few
-- seconds of looking find; "failed": first how many and why, then some of them. And "typical", the
-- similarity of assets that have nothing to do with each other. (Images are cut, as some are data:
-- URLs, and empty in the place of null.)
create or replace function public.embedding_gallery(
  model_version text, client text default null, samples int default 30
) returns jsonb
language plpgsql stable security definer
set search_path = public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
set statement_timeout = '55s'
as $$
#variable_conflict use_column
declare
  ids uuid[];
  found jsonb;
  pairs jsonb := '[]';
  after uuid;
begin
  ids := array(
    select id from (
      select s.id, row_number() over (
        partition by s.client order by hashtextextended(s.id::text, 1)) as turn
      from embedding_sources s join product_embeddings e on e.asset_id = s.id
      where e.model_version = embedding_gallery.model_version
        and (embedding_gallery.client is null or s.client = embedding_gallery.client)
    ) spread order by turn, hashtextextended(id::text, 1) limit samples);
  loop
    found := duplicate_products(0.9, embedding_gallery.client, after, 250);
    pairs := (
      select coalesce(jsonb_agg(pair), '[]') from (
        select pair from jsonb_array_elements(pairs || (found -> 'pairs')) pair
        order by pair -> 'similarity' desc limit 24) best);
    after := found ->> 'last';
    exit when after is null or clock_timestamp() > statement_timestamp() + interval '4 s';
  end loop;
  return jsonb_build_object(
    'near', (
      select coalesce(jsonb_agg(array[jsonb_build_array(s.id, left(concat(s.image), 300000))] || (
        select array_agg(
          jsonb_build_array(n.asset_id, left(concat(n.image), 300000), n.similarity)
          order by n.similarity desc)
        from similar_products(s.id, 6, embedding_gallery.client) n)
      order by s.client, s.id), '[]')
      from embedding_sources s where s.id = any (ids)),
    'pairs', (
      select coalesce(jsonb_agg(jsonb_build_array(
        jsonb_build_array(p -> 'asset_id', left(concat(p ->> 'image'), 300000)),
        jsonb_build_array(
          p -> 'duplicate_id', left(concat(p ->> 'duplicate_image'), 300000), p -> 'similarity')
      )), '[]')
      from jsonb_array_elements(pairs) p),
    'failed', (
      select coalesce(jsonb_agg(
        array[jsonb_build_array(r.count || ' ' || r.why)] || r.assets order by r.count desc), '[]')
      from (
        select f.stage || ': ' || f.reason as why, count(*),
          (array_agg(jsonb_build_array(s.id, left(concat(s.image), 2000)) order by s.id))[:20]
            as assets
        from product_embedding_failures f join embedding_sources s on s.id = f.asset_id
        where f.model_version = embedding_gallery.model_version
          and (embedding_gallery.client is null or s.client = embedding_gallery.client)
        group by 1 order by 2 desc limit 50) r),
    'typical', (
      select percentile_cont(0.5) within group (order by 1 - (a.embedding <=> b.embedding))
      from product_embeddings a join product_embeddings b on a.asset_id < b.asset_id
      where a.asset_id = any (ids) and b.asset_id = any (ids)));
end $$;

-- The service role alone may call these. (New functions may be called by everyone.)
revoke execute on function
  public.embedding_status(text, text, int, int),
  public.pending_assets(text, text, uuid, int, timestamptz, boolean, int, int),
  public.store_embeddings(text, json, json), public.store_embedding_rows(text, json, json),
  public.embedding_back_off(int, text), public.forget_embedding(),
  public.match_products(vector, int, text, text), public.similar_products(uuid, int, text),
  public.duplicate_products(float8, text, uuid, int, int),
  public.embedding_gallery(text, text, int)
  from public, anon, authenticated, service_role;
grant execute on function
  public.embedding_status(text, text, int, int),
  public.pending_assets(text, text, uuid, int, timestamptz, boolean, int, int),
  public.store_embeddings(text, json, json), public.match_products(vector, int, text, text),
  public.similar_products(uuid, int, text),
  public.duplicate_products(float8, text, uuid, int, int),
  public.embedding_gallery(text, text, int)
  to service_role;

-- To let signed-in users search, and find what the policies on your assets show them, no more (run
-- it again after this file, which closes the search):
--   grant select on public.embedding_sources, public.product_embeddings to authenticated;
--   grant execute on function
--     public.match_products, public.similar_products, public.duplicate_products to authenticated;
--   drop policy if exists "As the asset itself" on public.product_embeddings;
--   create policy "As the asset itself" on public.product_embeddings for select to authenticated
--     using (exists (select from public.embedding_sources s where s.id = asset_id));
-- They need select on the assets, too. Visitors who are not signed in: let your server ask.

-- Self-test: a view that lacks a column or cannot be locked is known here, not in the night.
do $$ begin
  perform embedding_status('', ''), pending_assets('', '', wanted => 1), store_embeddings(''),
    embedding_gallery('', '');
exception when others then
  raise exception using errcode = sqlstate, message = sqlerrm, hint =
    'The view embedding_sources must give (id, image, client), id of the type that this file says, '
    'the others text, and be lockable: no outer join, distinct or group by.';
end $$;

notify pgrst, 'reload schema';
commit;
