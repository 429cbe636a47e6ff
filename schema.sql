-- Image embeddings of products: what generate_embeddings.py needs in the database, and the search.
--
-- Run this file in Supabase's SQL editor, or with psql. It needs pgvector 0.8 or later, runs as a
-- whole or not at all, and running it again does no harm.
--
-- Made for a table   public.assets (id uuid primary key, image_url text, client_name text).
-- Yours differs? The section "Your tables" is the only one that names it. Are your ids bigint or
-- text? Replace the word uuid by that in the whole file. A table product_embeddings that is there
-- already is kept; from then on the service role alone may use it (see "Access").
-- Restored from a dump without privileges? Run it again: until then everybody may call it all.
--
-- As a migration: copy it as it stands to supabase/migrations/<timestamp>_embeddings.sql, the begin
-- and commit included, and the next version of it to a new one. Tried with the supabase CLI 3.1:
-- db push applies it, or nothing of it; db diff finds no difference to a database where it was run
-- by hand; db lint finds no error. Two warnings are meant so: plpgsql_check's on match_products and
-- embedding_pairs (a stable function that sets a setting, or looks at the clock), and the
-- advisor's on embedding_shard and embedding_image_hash. Their reasons stand there.

begin;
set local search_path = public, extensions;
set local lock_timeout = '10s';  -- an app's long transaction ends this file, not the app's work
set local row_security = off;  -- a policy that would hide rows from what is made here is an error
set local embeddings.functions =  -- what this file makes, beside the trigger's function
  '{embedding_image_hash, embedding_shard, embedding_back_off, embedding_status, pending_assets,
    store_embedding_rows, store_embeddings, match_products, similar_products, duplicate_products,
    embedding_pictures, embedding_search, embedding_gallery, embedding_pairs, failed_assets}';

-- Older projects have pgvector in public, and there it stays.
do $$ begin
  if to_regnamespace('extensions') is null then
    create schema extensions;
    grant usage on schema extensions to anon, authenticated, service_role;
  end if;
  if not has_schema_privilege('service_role', 'public', 'usage') then
    grant usage on schema public to service_role;  -- lost where public was dropped and made anew
  end if;
end $$;
create extension if not exists vector with schema extensions;

do $$
declare
  version text := (select extversion from pg_extension where extname = 'vector');
  place text := (select extnamespace::regnamespace from pg_extension where extname = 'vector');
begin
  if string_to_array(version, '.')::int[] < '{0,8}' then
    raise exception 'pgvector % is too old, this needs 0.8.0 or later', version using hint =
      'Run: alter extension vector update; if that brings no newer one, upgrade the project '
      '(Settings > Infrastructure).';
  end if;
  if place not in ('public', 'extensions') then
    raise exception 'pgvector is in the schema %, where the functions below do not look', place
    using hint = 'Run: alter extension vector set schema extensions;';
  end if;
end $$;

-- What an earlier run made for ids of another type, or another program made.
do $$
declare
  old record;
  functions text;
begin
  for old in
    select * from (values ('public.embedding_sources', 'id'),
                          ('public.product_embeddings', 'asset_id'),
                          ('public.product_embedding_failures', 'asset_id')) v (relation, id)
    where to_regclass(relation) is not null
  loop
    execute format('select from %s where %s = null::uuid', old.relation, old.id);
  end loop;
exception when undefined_function or undefined_column then
  select string_agg(format('drop function public.%I(%s);', proname,
                           pg_get_function_identity_arguments(oid)), ' ')
  into functions
  from pg_proc
  where pronamespace = 'public'::regnamespace
    and proname = any (current_setting('embeddings.functions')::text[]);
  raise exception '% has no % of type uuid', old.relation, old.id using hint = concat(
    'Put aside what was made for other ids and run this file again: '
    'drop view if exists public.embedding_failures, public.embedding_sources; '
    'drop table if exists public.product_embedding_failures; '
    'alter table if exists public.product_embeddings rename to product_embeddings_old; ',
    functions);
end $$;

-- The triggers of this file's first versions.
drop function if exists public.forget_asset_embedding, public.clear_embedding_failure,
  public.count_embedding_attempt, public.skip_embedding_failure, public.await_image_change cascade;

-- The trigger below needs a function; its body stands further down.
create or replace function public.forget_embedding() returns trigger
language plpgsql as 'begin return null; end';

-- Your tables ----------------------------------------------------------------------------------

-- What asset_id refers to, as table (column): a deleted asset takes its rows along, a changed id
-- changes theirs. To empty the table: truncate public.assets cascade.
set local embeddings.assets = 'public.assets (id)';

do $$
declare
  assets text := regexp_replace(current_setting('embeddings.assets'), ' *\([^()]*\)$', '');
begin
  if assets <> '' and to_regclass(assets) is null then
    raise exception 'there is no table %', assets using hint =
      'Put the name of yours into the section "Your tables" of this file.';
  end if;
end $$;

-- The views are made anew, but where you granted them to somebody: one that is replaced can lose no
-- column, nor change the type of one.
do $$ begin
  if to_regproc('public.embedding_status') is not null and not exists (
    select from pg_class c, aclexplode(c.relacl) granted
    where c.oid in (to_regclass('public.embedding_failures'),
                    to_regclass('public.embedding_sources'))
      and granted.grantee not in (c.relowner, 'service_role'::regrole)
  ) then
    drop view if exists public.embedding_failures, public.embedding_sources;
  end if;
exception when others then
  null;  -- something of yours reads it, or drops are not allowed: it is replaced
end $$;

-- What the script embeds: an id, an image and a client's name, both text. An image is a full URL, a
-- data: URL, or a path that begins with /storage/v1/object/, which is the project's own storage.
-- A fourth column, title, is what --gallery and --search call an asset; without one they take the
-- last part of its URL. Assets that this leaves out are left alone. More columns than these do no
-- harm unless they are called like a parameter of the functions below, as "after" is.
-- The same picture must read the same in each run: an image that reads otherwise is a new one, and
-- is embedded anew. So no now() in it, no signature and no ?v= that changes without the picture.
create or replace view public.embedding_sources with (security_invoker = true) as
  select a.id, a.image_url as image, a.client_name as client
  from public.assets a;

-- The search functions read the assets with the rights of whoever calls them.
grant select on public.assets to service_role;

-- A new image: forget what is known of the old one, so that the search no longer goes by it. (The
-- next run finds a new image with or without this, but where the vector's embedded_image_hash is
-- null, as in rows from before that column.) The column that holds it, twice, and the name
-- of the id's column, as it is spelled in the table and without double quotes.
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
-- Products with names of their own:
--   select a.id, a.image_url as image, a.client_name as client, a.name as title
--   from public.assets a;
-- A path made a URL (the trigger then watches image_path):
--   select a.id, 'https://cdn.example.com/' || a.image_path as image, a.client_name as client
--   from public.assets a;
-- A list of URLs, of which the first one counts, as in "a.jpg, b.jpg":
--   select a.id, trim(split_part(a.images, ',', 1)) as image, a.client_name as client
--   from public.assets a;
-- The same as an array (text[]):
--   select a.id, a.images[1] as image, a.client_name as client from public.assets a;
-- The same as a JSON array (jsonb; of json, the trigger compares old.images::text with the new):
--   select a.id, a.images ->> 0 as image, a.client_name as client from public.assets a;
-- Images in a table of their own, of which the first one counts (grant select on that one, too):
--   select a.id, (select p.url from public.photos p where p.asset_id = a.id
--       order by p.position, p.url limit 1) as image, a.client_name as client
--   from public.assets a;
-- The trigger then watches that table, with the column that holds the asset's id. Each run looks up
-- the first photo of each asset:
--   create index on public.photos (asset_id, position, url);
--   create or replace trigger forget_embedding
--     after insert or delete or update of asset_id, url, position on public.photos
--     for each row execute function public.forget_embedding('asset_id');
-- Then any new photo of an asset makes it pending.
-- A path in a bucket of the project's own storage, here "photos". There is no host in it, so that
-- one file does for local development, branches and production:
--   select a.id, '/storage/v1/object/authenticated/photos/' || a.image_path as image,
--     a.client_name as client
--   from public.assets a;
-- Assets whose rows cannot be locked: a materialised view, distinct, group by, an outer join. With
-- "with" nothing is locked, and the next run sees that an image changed in the moment of storing:
--   with a as (select distinct on (b.id) b.* from public.assets b order by b.id, b.image_url)
--   select a.id, a.image_url as image, a.client_name as client from a;
--
-- No foreign key (partitioned, inherited, unlogged, foreign or materialised assets, assets without
-- a key):
--   set local embeddings.assets = '';
-- A view has no trigger either: put that on the table behind it. A table that others inherit from
-- hands none on: put one on each. A foreign table's fires for changes made here alone. Rows of
-- assets that are gone then stay. The search never shows them; to be rid of them:
--   delete from public.product_embeddings e
--     where not exists (select from public.embedding_sources s where s.id = e.asset_id);
--   delete from public.product_embedding_failures f
--     where not exists (select from public.embedding_sources s where s.id = f.asset_id);
-- Changes that come by logical replication fire no trigger, unless, after each run of this file:
--   alter table public.assets enable always trigger forget_embedding;
-- A key of several columns wants one to stand for it (then asset_id refers to it, and the ids are
-- text):
--   alter table public.assets add column asset_key text
--     generated always as (shop || '/' || sku) stored unique;
--
-- Many clients? Searching one client's products wants an index on that column:
--   create index on public.assets (client_name);

-- The view, looked at ---------------------------------------------------------------------------

do $$
declare
  wrong text;
begin
  select string_agg(wanted, ', ') into wrong from unnest(array['id', 'image', 'client']) wanted
  where not exists (
    select from pg_attribute
    where attrelid = 'public.embedding_sources'::regclass and attname = wanted);
  if wrong is not null then
    raise exception 'embedding_sources has no column %', wrong using hint =
      'The view must give (id, image, client). No clients: null::text as client.';
  end if;

  select string_agg(attname || ' is ' || format_type(atttypid, atttypmod), ', ') into wrong
  from pg_attribute join pg_type t on t.oid = atttypid
  where attrelid = 'public.embedding_sources'::regclass
    and (attname in ('image', 'client', 'title') and typcategory <> 'S'
         or attname = 'id' and atttypid = 'bpchar'::regtype);
  if wrong is not null then
    raise exception 'embedding_sources must give text: %', wrong using hint = case
      when wrong ~ 'image is (json|.*\[\])' then 'The section "Your tables" shows how to take the '
        'first of several images: a.images ->> 0 of jsonb, a.images[1] of an array.'
      else 'Add ::text to that column where the view selects it.' end;
  end if;

  select format_type(atttypid, null) into wrong from pg_attribute
  where attrelid = 'public.embedding_sources'::regclass and attname = 'id';
  perform from embedding_sources s where s.id = null::uuid;
  perform from embedding_sources s limit 1 for no key update skip locked;
  if exists (  -- among some: the app waits for this file
    select from (select id from embedding_sources limit 100000) s
    group by s.id having count(*) > 1 or s.id is null
  ) then
    raise exception 'embedding_sources gives an id several times, or null' using hint =
      'It must give one row for an asset. The section "Your tables" shows how to take the first of '
      'several images; leave out what has no id: where a.id is not null.';
  end if;
exception
  when undefined_function then
    raise exception 'the ids of embedding_sources are %, and this file says uuid', wrong
    using hint = 'Replace the word uuid by ' || wrong || ' in the whole file.';
  when insufficient_privilege then
    raise exception 'embedding_sources cannot be read and locked by %: %', current_user, sqlerrm
    using hint = 'The functions below do that as the role that runs this file. It should own the '
      'tables, or may do all with them, and no policy may hide rows from it (bypassrls).';
  when feature_not_supported or wrong_object_type then
    raise exception 'the rows of embedding_sources cannot be locked: %', sqlerrm using hint =
      'No outer join, distinct or group by there; or "with", as the section "Your tables" says.';
end $$;

-- Tables ---------------------------------------------------------------------------------------

-- One vector of unit length per asset. It counts while model_version is the script's, and the
-- asset's image the one that embedded_image_hash tells. So the next run finds each new image, be it
-- by a change of the view or past the trigger. The search does not ask for the hash: the trigger is
-- there for it. (Null, in rows from before the column: of any image. Those rely on the trigger
-- alone.) An embedding that is null, where an older table has such, counts as none.
create table if not exists public.product_embeddings (
  asset_id uuid primary key,
  embedding vector(512) not null,
  model_version text not null,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  embedded_image_hash bigint
);

-- Why an asset has no embedding. Permanent failures (404, not an image, ...) are not tried again.
-- image_hash says which image failed: for another one the row does not hold. (Null: for any.)
create table if not exists public.product_embedding_failures (
  asset_id uuid primary key,
  model_version text not null,
  image_hash bigint,
  stage text not null,
  reason text not null,
  permanent boolean not null,
  attempts int not null default 1,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);

-- Tables from before this file, or its last version, may lack what the functions below rely on. An
-- alter only where they do: it waits for the searches that are going on, some of which wait for the
-- views, which this transaction holds.
do $$
declare
  lacking record;
begin
  if exists (
    select from pg_class
    where oid = 'public.product_embeddings'::regclass and relkind not in ('r', 'p')
  ) then
    raise exception 'product_embeddings is there already, and is no table' using hint =
      'Give it another name and run this file again: '
      'alter table public.product_embeddings rename to product_embeddings_old;';
  end if;

  for lacking in
    select * from (values
      ('product_embeddings', 'model_version', 'text', null),
      ('product_embeddings', 'embedded_image_hash', 'bigint', null),
      ('product_embeddings', 'created_at', 'timestamptz', 'now()'),
      ('product_embeddings', 'updated_at', 'timestamptz', 'now()'),
      ('product_embedding_failures', 'image_hash', 'bigint', null)
    ) v (relation, name, type, standard)
    where not exists (
      select from pg_attribute
      where attrelid = relation::regclass and attname = name and (standard is null or atthasdef))
  loop
    execute format('alter table %I add column if not exists %I %s',
      lacking.relation, lacking.name, lacking.type);
    if lacking.standard is not null then  -- after it, as old rows have none
      execute format('alter table %I alter %I set default %s',
        lacking.relation, lacking.name, lacking.standard);
    end if;
  end loop;
end $$;

do $$
begin
  if not exists (
    select from pg_attribute
    where attrelid = 'public.product_embeddings'::regclass and attname = 'embedding'
      and atttypid = 'vector'::regtype and atttypmod = 512
  ) then
    raise exception 'product_embeddings.embedding is no vector(512)' using hint =
      'Put the old table aside and run this file again: '
      'alter table public.product_embeddings rename to product_embeddings_old; '
      'or, where its vectors do have 512 numbers: '
      'alter table public.product_embeddings alter column embedding '
      'type vector(512);';
  end if;

  if exists (
    select from pg_attribute join pg_type t on t.oid = atttypid
    where attrelid = 'public.product_embeddings'::regclass and attname = 'model_version'
      and typcategory <> 'S'
  ) then
    raise exception 'product_embeddings.model_version is no text' using hint =
      'Run: alter table public.product_embeddings alter column model_version type text;';
  end if;

  if not exists (
    select from pg_index i join pg_attribute a on a.attrelid = i.indrelid
    where i.indrelid = 'public.product_embeddings'::regclass and a.attname = 'asset_id'
      and i.indisunique and i.indisvalid and i.indpred is null and i.indkey::text = a.attnum::text
  ) and exists (
    select from product_embeddings group by asset_id having count(*) > 1 or asset_id is null
  ) then
    raise exception 'product_embeddings has several rows for one asset_id, or rows without one'
    using hint =
      'Keep one of each, the newest of the present model, and run this file again: '
      'delete from public.product_embeddings where ctid not in ('
      'select distinct on (asset_id) ctid from public.product_embeddings '
      'where asset_id is not null order by asset_id, '
      'model_version = ''clip-vit-base-patch32'' desc nulls last, updated_at desc nulls last);';
  end if;
end $$;

-- What an older table lacks. Constraints not valid: they hold for new rows, and what is not so in
-- old ones does no harm.
do $$
declare
  assets text := current_setting('embeddings.assets');
  relation regclass;
  known record;
  deferrable_keys text;
begin
  select string_agg(format('drop constraint %I', conname), ', ') into deferrable_keys
  from pg_constraint c join pg_attribute a on a.attrelid = c.conrelid
  where c.conrelid = 'public.product_embeddings'::regclass and c.contype in ('p', 'u')
    and c.condeferrable and c.conkey = array[a.attnum] and a.attname = 'asset_id';
  if deferrable_keys is not null then
    raise exception 'the key of product_embeddings is deferrable, which no upsert can use'
    using hint = 'Drop it, and run this file again, which makes one: '
      'alter table public.product_embeddings ' || deferrable_keys || ';';
  end if;

  -- A primary key where there is none: without it a publication refuses updates and deletes.
  if not exists (
    select from pg_index
    where indrelid = 'public.product_embeddings'::regclass and indisprimary
  ) then
    alter table product_embeddings add primary key (asset_id);
  elsif not exists (
    select from pg_index i join pg_attribute a on a.attrelid = i.indrelid
    where i.indrelid = 'public.product_embeddings'::regclass and a.attname = 'asset_id'
      and i.indisunique and i.indisvalid and i.indpred is null and i.indkey::text = a.attnum::text
  ) then
    create unique index on product_embeddings (asset_id);
  end if;

  if not exists (
    select from pg_constraint
    where conrelid = 'public.product_embeddings'::regclass and conname = 'embedding_of_zeros'
  ) then
    -- Those would be duplicates of everything.
    delete from product_embeddings where vector_norm(embedding) = 0;
    alter table product_embeddings
      add constraint embedding_of_zeros check (vector_norm(embedding) > 0) not valid;
  end if;

  foreach relation in array '{product_embeddings, product_embedding_failures}'::regclass[] loop
    -- A key to another table refuses rows; one without "cascade" keeps assets from being deleted.
    select c.conname, c.confrelid::regclass as target,
      c.confrelid = to_regclass(nullif(regexp_replace(assets, ' *\([^()]*\)$', ''), ''))
        and c.confdeltype = 'c' as fits
    into known
    from pg_constraint c join pg_attribute a on a.attrelid = c.conrelid
    where c.conrelid = relation and c.contype = 'f' and c.conkey = array[a.attnum]
      and a.attname = 'asset_id'
    order by fits limit 1;
    continue when known.fits;
    if known.conname is not null then
      raise exception 'the foreign key % refers to %, or lacks "on delete cascade"',
        known.conname, known.target using hint = format(
        'It would refuse rows, or keep assets from being deleted. Run, and then this file again, '
        'which adds its own where "Your tables" names the assets: '
        'alter table public.%s drop constraint %I;', relation, known.conname);
    end if;
    continue when assets = '';
    execute format(
      'alter table %s add foreign key (asset_id) references %s on delete cascade on update cascade '
      'not valid', relation, assets);
  end loop;
exception when invalid_foreign_key or datatype_mismatch or wrong_object_type or undefined_column
  or invalid_table_definition or object_not_in_prerequisite_state or insufficient_privilege then
  raise exception 'no foreign key can refer to %: %', assets, sqlerrm using hint =
    'The section "Your tables" of this file names it, and says how to do without: '
    'set local embeddings.assets = '''';';
end $$;

-- The index of the search. On a large table it takes longer than the SQL editor waits, and would
-- keep the app waiting. One of that name that is not valid, or another table's, is left from a
-- build that was cancelled, or of a table that was put aside.
do $$ begin
  if exists (
    select from pg_index i join pg_opclass o on o.oid = i.indclass[0]
      join pg_am m on m.oid = o.opcmethod
      join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
    where i.indrelid = 'public.product_embeddings'::regclass and i.indisvalid
      and o.opcname = 'vector_cosine_ops' and m.amname = 'hnsw'
      and a.attname = 'embedding' and i.indpred is null
  ) then
    return;
  end if;
  if (select count(*) from (select from product_embeddings limit 5001) as few) > 5000 then
    raise warning 'product_embeddings has no HNSW index: create it as schema.sql says';
    return;
  end if;
  drop index if exists public.product_embeddings_embedding_hnsw;
  create index product_embeddings_embedding_hnsw
    on product_embeddings using hnsw (embedding vector_cosine_ops);
end $$;

-- Millions of rows to load for the first time? Without the index that goes quicker:
--   drop index public.product_embeddings_embedding_hnsw;
-- and then by psql over the direct connection, not the pooler (the SQL editor gives up too soon):
--   set statement_timeout = 0;
--   set maintenance_work_mem = '4GB';  -- a million rows; it must be there
--   set max_parallel_maintenance_workers = 0;  -- needed before pgvector 0.8.2 (CVE-2026-3172)
--   drop index if exists public.product_embeddings_embedding_hnsw;  -- left from a cancelled build
--   create index concurrently product_embeddings_embedding_hnsw
--     on public.product_embeddings using hnsw (embedding vector_cosine_ops);
-- The index takes about 4 KB of disk a row, as much as the table.

-- Access ---------------------------------------------------------------------------------------

-- The service role alone. It bypasses row level security, and there is no policy, which is meant so
-- (the advisor's notice 0008).
do $$ begin
  if exists (  -- see above: an alter only where it is lacking
    select from pg_class where not relrowsecurity
      and oid in ('product_embeddings'::regclass, 'product_embedding_failures'::regclass)
  ) then
    alter table public.product_embeddings enable row level security;
    alter table public.product_embedding_failures enable row level security;
  end if;
end $$;
revoke all on public.embedding_sources, public.product_embeddings, public.product_embedding_failures
  from public, anon, authenticated;
grant select on public.embedding_sources to service_role;
grant select, insert, update, delete
  on public.product_embeddings, public.product_embedding_failures to service_role;

do $$
declare
  policies text := (
    select string_agg(quote_ident(policyname) || ' on ' || tablename, ', ') from pg_policies
    where schemaname = 'public' and policyname not like '%as the asset itself'
      and tablename in ('product_embeddings', 'product_embedding_failures'));
begin
  if policies is not null then
    raise warning 'policies from before this file, which open rows to whom they name: %', policies;
  end if;
  if has_schema_privilege('public', 'public', 'create') then
    raise warning 'everybody may make functions and tables in the schema public: '
      'revoke create on schema public from public;';
  end if;
end $$;

-- For the script -------------------------------------------------------------------------------
--
-- What all functions below have in common:
--   security definer: they read and write as their owner, so the service role needs no grant.
--   search_path: pg_catalog first, and arguments of the exact types of what is built in, so that
--     nothing in public takes its place.
--   force_custom_plan: which parameters are null decides what a good plan is.
--   #variable_conflict use_column: a name that a column and a parameter share means the column; the
--     parameter has its function's name in front, as in pending_assets.client.

-- What tells whether an image is still the one that was found, embedded, or that failed. Asked for
-- each of a million assets, as is embedding_shard, so it must become a part of the query, which a
-- function with a search_path of its own cannot. It needs none, as its names are looked up here and
-- now (the advisor's warning 0011 does not see that).
create or replace function public.embedding_image_hash(image text) returns bigint
language sql immutable parallel safe
return hashtextextended(coalesce(image, ''), 0::bigint);

-- The failures that hold: of images that are still the assets'. Where the image is another one by
-- now, be it by its table or by a change of the view, the asset is pending like any other.
create or replace view public.embedding_failures with (security_invoker = true) as
  select f.asset_id, s.image, s.client, f.model_version, f.stage, f.reason, f.permanent, f.attempts,
    f.updated_at
  from public.product_embedding_failures f join public.embedding_sources s on s.id = f.asset_id
  where coalesce(f.image_hash = public.embedding_image_hash(s.image), true);

revoke all on public.embedding_failures from public, anon, authenticated;
grant select on public.embedding_failures to service_role;

-- The shard that an asset belongs to, from 1 to shards. (No search_path: see embedding_image_hash.)
create or replace function public.embedding_shard(id text, shards int) returns int
language sql immutable parallel safe
return 1 + (hashtextextended(id, 0::bigint) & 9223372036854775807) % shards;

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
  slow constant boolean := reason ^@ 'not complete within';
  steps constant int := least(attempts, 9) + case when slow then 1 else 0 end;
begin
  return (least(power(2, steps - 1), 169) - 1) * interval '1 hour';
end $$;

-- What there is of one client and shard, counted exactly; "waiting" are those that failed for now
-- and are not due again yet. A failure row says more than a vector beside it: see
-- forget_embedding. Where there is no such client: the names of others, for a hint. "is null or",
-- because an image may cost something, be it a subquery or a long data: URL. Each run begins here,
-- so here it is noticed that a dump was restored without privileges.
create or replace function public.embedding_status(
  model_version text, client text default null, shard int default 1, shards int default 1
) returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
set statement_timeout = '55s'
as $$
#variable_conflict use_column
declare
  called_by_all text := (
    select string_agg(proname, ', ') from pg_proc
    where pronamespace = 'public'::regnamespace and prosecdef
      and proname in ('embedding_status', 'pending_assets', 'store_embeddings', 'embedding_search',
        'embedding_gallery', 'embedding_pairs', 'failed_assets')
      and (has_function_privilege('anon', oid, 'execute')
        or has_function_privilege('authenticated', oid, 'execute')));
begin
  if called_by_all is not null then
    raise exception 'anon or authenticated may call what is the service role''s alone (%): '
      'run schema.sql again, which closes it', called_by_all;
  end if;
  return (
    select jsonb_build_object(
      'contract', 2,  -- CONTRACT in generate_embeddings.py
      'time', now(),
      'client_exists', embedding_status.client is null or exists (
        select from embedding_sources c where c.client = embedding_status.client),
      'other_clients', (
        select jsonb_agg(name) from (
          select distinct c.client as name from embedding_sources c
          where embedding_status.client is not null and not exists (
            select from embedding_sources d where d.client = embedding_status.client)
          limit 1000) names),
      'assets', count(*),
      'done', count(*) filter (where e.asset_id is not null and f.asset_id is null),
      'waiting', count(*) filter (where not f.permanent and f.updated_at
        + embedding_back_off(f.attempts, f.reason) >= now()),
      'failed_for_good', count(*) filter (where f.permanent))
    from embedding_sources s
    left join product_embeddings e
      on e.asset_id = s.id and e.model_version = embedding_status.model_version
      and e.embedding is not null
      and (e.embedded_image_hash is null or e.embedded_image_hash = embedding_image_hash(s.image))
    left join embedding_failures f
      on f.asset_id = s.id and f.model_version = embedding_status.model_version
    where (embedding_status.client is null or s.client = embedding_status.client)
      and (shards = 1 or embedding_shard(s.id::text, shards) = shard));
end $$;

-- The next assets to embed after an id: new ones, or those that failed before a moment (and are due
-- again: see embedding_back_off). One JSON value, as the API cuts a list of rows at 1,000. At most
-- 8 MB of images at once, for some are data: URLs; one that is larger by itself comes cut short.
-- Ids first, so that no image is read before it is known which ones fit. "::int <> 0" has the
-- planner expect that nearly all vectors are of the present image. By itself it expects half of
-- them to be, and looks for those that are not asset by asset.
create or replace function public.pending_assets(
  model_version text, client text default null, after uuid default null, wanted int default 250,
  failed_before timestamptz default null, permanent_too boolean default false,
  shard int default 1, shards int default 1
) returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, public, extensions, pg_temp
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
        and (shards = 1 or embedding_shard(s.id::text, shards) = shard)
        and not exists (
          select from product_embeddings e
          where e.asset_id = s.id and e.model_version = pending_assets.model_version
            and e.embedding is not null
            and (e.embedded_image_hash is null
              or e.embedded_image_hash = embedding_image_hash(s.image))::int <> 0)
        and not exists (
          select from embedding_failures f
          where f.asset_id = s.id and f.model_version = pending_assets.model_version)
      order by s.id limit wanted);
  else
    ids := array(
      select f.asset_id from embedding_failures f
      where f.model_version = pending_assets.model_version
        and f.updated_at < failed_before
        and (permanent_too or not f.permanent and f.updated_at
          + embedding_back_off(f.attempts, f.reason) < failed_before)
        and (pending_assets.client is null or f.client = pending_assets.client)
        and (after is null or f.asset_id > after)
        and (shards = 1 or embedding_shard(f.asset_id::text, shards) = shard)
      order by f.asset_id limit wanted);
  end if;

  return (
    with sized as (
      select s.id, coalesce(octet_length(s.image::text), 0) as bytes
      from embedding_sources s where s.id = any (ids)
    ), summed as (
      select id, bytes,
        sum(case when bytes > most then most / 8 else bytes end) over (order by id) as total
      from sized
    ), page as (
      select p.id, p.bytes, s.image::text as image
      from summed p join embedding_sources s on s.id = p.id
      where p.total <= most
    )
    select jsonb_build_object(
      'assets', coalesce(jsonb_agg(jsonb_build_object(
        'id', id, 'image', case when bytes > most then left(image, 100) else image end,
        'image_hash', embedding_image_hash(image), 'bytes', bytes
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
set search_path = pg_catalog, public, extensions, pg_temp
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
    select s.id, embedding_image_hash(s.image) as image_hash
    from embedding_sources s where s.id = any (array(select g.asset_id from given g))
    order by s.id for no key update skip locked
  ), stored as (
    insert into product_embeddings as e
      (asset_id, embedding, model_version, embedded_image_hash)
    select g.asset_id, g.embedding, store_embedding_rows.model_version, g.image_hash from given g
    where not g.failed and (g.asset_id, g.image_hash) in (select l.id, l.image_hash from locked l)
    on conflict (asset_id) do update set
      embedding = excluded.embedding, model_version = excluded.model_version,
      embedded_image_hash = excluded.embedded_image_hash, updated_at = now()
    returning e.asset_id
  ), seen as materialized (
    select g.asset_id, case
      when g.asset_id not in (select l.id from locked l) then 'not locked'
      when (g.asset_id, g.image_hash) not in (select l.id, l.image_hash from locked l)
        then 'changed'
      when g.failed then 'due'
      when g.asset_id in (select s.asset_id from stored s) then 'stored'
      else 'refused' end as outcome
    from given g
  )
  select array_agg(asset_id), array_agg(outcome),
    array_agg(asset_id) filter (where outcome = 'stored'),
    array_agg(asset_id) filter (where outcome = 'due')
  into ids, outcomes, written, due
  from seen;
  delete from product_embedding_failures f where f.asset_id = any (written);

  if due is not null then
    -- A vector that does not know its image, with a failure beside it, is of an older one: see
    -- forget_embedding. One that does know it stays: it counts again when a view that was mistaken
    -- is mended.
    delete from product_embeddings e using product_embedding_failures f
    where e.asset_id = any (due) and e.model_version = store_embedding_rows.model_version
      and e.embedded_image_hash is null and e.embedding is not null
      and f.asset_id = e.asset_id and f.model_version = store_embedding_rows.model_version;

    with recorded as (
      insert into product_embedding_failures as f
        (asset_id, model_version, image_hash, stage, reason, permanent)
      select r.asset_id, store_embedding_rows.model_version, r.image_hash, r.stage, r.reason,
        r.permanent
      from json_to_recordset(failures)
        r (asset_id uuid, image_hash bigint, stage text, reason text, permanent boolean)
      where r.asset_id = any (due)
        and not exists (
          select from product_embeddings e where e.asset_id = r.asset_id
          and e.model_version = store_embedding_rows.model_version and e.embedding is not null
          and coalesce(e.embedded_image_hash = r.image_hash, true))
      on conflict (asset_id) do update set
        model_version = excluded.model_version, image_hash = excluded.image_hash,
        stage = excluded.stage, reason = excluded.reason, permanent = excluded.permanent,
        updated_at = now(), attempts = case
          when f.model_version <> excluded.model_version then 1
          when f.image_hash <> excluded.image_hash then 1
          else f.attempts + 1 end
      returning f.asset_id
    )
    select array_agg(asset_id) into noted from recorded;
  end if;

  return (
    select coalesce(jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
      'asset_id', asset_id, 'outcome', outcome,
      'reason', case when outcome = 'refused' then 'a trigger left the row out' end))), '[]')
    from (
      select g.asset_id, case
        when g.outcome = 'not locked' and exists (
          select from embedding_sources s where s.id = g.asset_id) then 'busy'
        when g.outcome = 'not locked' then 'deleted'
        when g.outcome <> 'due' then g.outcome
        when g.asset_id = any (noted) then 'noted'
        when exists (
          select from product_embeddings e join embedding_sources s on s.id = e.asset_id
          where e.asset_id = g.asset_id
          and e.model_version = store_embedding_rows.model_version and e.embedding is not null
          and coalesce(e.embedded_image_hash = embedding_image_hash(s.image), true)
        ) then 'superseded'
        else 'refused' end as outcome
      from unnest(ids, outcomes) g (asset_id, outcome)
    ) answers);
end $$;

-- Stores vectors and records failures, in one transaction, and says of each row what became of it:
-- stored, noted, superseded (a failure, but the image has a vector), deleted, changed (the image),
-- busy (somebody holds the asset or its row: never waited for), refused (with the reason). A row
-- that the database refuses costs itself alone. Other errors end the call, with nothing stored.
-- Of json and not jsonb: a batch is taken in quicker.
create or replace function public.store_embeddings(
  model_version text, vectors json default '[]', failures json default '[]'
) returns jsonb
language plpgsql security definer
set search_path = pg_catalog, public, extensions, pg_temp
set statement_timeout = '55s'
set lock_timeout = '2s'
as $$
declare
  answers jsonb := jsonb '[]';
  single record;
begin
  begin
    return store_embedding_rows(model_version, vectors, failures);
  exception when data_exception or integrity_constraint_violation or cardinality_violation
    or with_check_option_violation or plpgsql_error or lock_not_available then
    null;  -- Nothing is stored yet: on purpose it goes on below, row by row.
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
-- tables. It neither fails nor waits: a vector that cannot be deleted just now (an index is being
-- built) stays until the next run. One without a hash, by which that run would know it, gets a
-- failure row at its side.
create or replace function public.forget_embedding() returns trigger
language plpgsql security definer
set search_path = pg_catalog, public, extensions, pg_temp
set lock_timeout = '250ms'
as $$
declare
  one uuid;  -- the row's asset before, null for an insert
  other uuid;  -- and after, null for a delete
begin
  execute format('select ($1).%1$I, ($2).%1$I', tg_argv[0]) into one, other using old, new;
  delete from product_embedding_failures f where f.asset_id in (one, other);
  lock table product_embeddings in row exclusive mode nowait;
  delete from product_embeddings e where e.asset_id in (one, other);
  return null;
exception
  when lock_not_available then
    begin
      delete from product_embedding_failures f where f.asset_id in (one, other);
      insert into product_embedding_failures (asset_id, model_version, stage, reason, permanent)
      select e.asset_id, e.model_version, 'store', 'the image changed while its row was locked',
        false
      from product_embeddings e
      where e.asset_id in (one, other) and e.embedded_image_hash is null;
    exception when others then
      raise warning 'the embedding of asset % was not forgotten: %', coalesce(other, one), sqlerrm;
    end;
    return null;
  when others then
    -- An error of ours must not break the app's update.
    raise warning 'the embedding of asset % was not forgotten: %', coalesce(other, one), sqlerrm;
    return null;
end $$;

-- Search ---------------------------------------------------------------------------------------

-- The assets whose images are nearest to a vector, nearest first; similarity is the cosine, 1 at
-- most. client and model_version narrow the search where they are given. 1,000 matches at most.
--
-- force_custom_plan: the planner must see the client to choose between the HNSW index and, for a
-- client with few assets, an exact sort of those. iterative_scan: a filtered or long search goes on
-- in the index until there are enough rows, or max_scan_tuples have been looked at: a client whose
-- products are rarer than that among those near the vector may get fewer. They are set in the body,
-- for this transaction: a "set" of the function itself could be restored from a dump by a superuser
-- alone. (plpgsql_check warns of that in a stable function. It changes no row, and so is harmless.)
create or replace function public.match_products(
  query_embedding vector(512), match_count int default 10, client text default null,
  model_version text default null
) returns table (asset_id uuid, image text, similarity float8)
language plpgsql stable
set search_path = pg_catalog, public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
as $$
#variable_conflict use_column
begin
  perform set_config('hnsw.iterative_scan', 'strict_order', true),
    set_config('hnsw.max_scan_tuples', '40000', true),
    set_config('hnsw.scan_mem_multiplier', '4', true);
  return query
    select e.asset_id, s.image::text, 1 - (e.embedding <=> query_embedding)
    from product_embeddings e join embedding_sources s on s.id = e.asset_id
    where e.embedding is not null
      and (match_products.client is null or s.client = match_products.client)
      and (match_products.model_version is null or e.model_version = match_products.model_version)
    order by e.embedding <=> query_embedding
    limit least(match_count, 1000);
end $$;

-- The assets that look most like this one, without itself; none if it has no embedding yet.
create or replace function public.similar_products(
  asset_id uuid, match_count int default 10, client text default null
) returns table (asset_id uuid, image text, similarity float8)
language sql stable
set search_path = pg_catalog, public, extensions, pg_temp
as $$
  select m.asset_id, m.image, m.similarity
  from product_embeddings e
  cross join lateral match_products(
    e.embedding, least(similar_products.match_count, 1000) + 1, similar_products.client,
    e.model_version) m
  where e.asset_id = similar_products.asset_id and m.asset_id <> e.asset_id
    and e.embedding is not null
  order by m.similarity desc
  limit similar_products.match_count
$$;

-- Pairs of assets that look the same, among the nearest few (100 at most) of each asset of one page
-- (1,000 at most); go on with "last" as the next page's after, until it is null. A pair comes once,
-- at its smaller id; of a group larger than neighbours not every pair comes. It may take 55 s, so
-- it is for the service role alone.
create or replace function public.duplicate_products(
  min_similarity float8 default 0.97, client text default null, after uuid default null,
  page int default 1000, neighbours int default 5
) returns jsonb
language plpgsql stable
set search_path = pg_catalog, public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
set statement_timeout = '55s'
as $$
#variable_conflict use_column
declare
  most constant int := least(page, 1000);
  ids uuid[] := array(
    select e.asset_id from product_embeddings e join embedding_sources s on s.id = e.asset_id
    where e.embedding is not null
      and (duplicate_products.client is null or s.client = duplicate_products.client)
      and (after is null or e.asset_id > after)
    order by e.asset_id limit most);
begin
  return (
    select jsonb_build_object(
      'pairs', coalesce(jsonb_agg(jsonb_build_object(
        'asset_id', e.asset_id, 'image', s.image, 'duplicate_id', m.asset_id,
        'duplicate_image', m.image, 'similarity', m.similarity
      ) order by e.asset_id, m.similarity desc), '[]'),
      'last', case when cardinality(ids) = most then ids[most] end)
    from product_embeddings e join embedding_sources s on s.id = e.asset_id
    cross join lateral match_products(
      e.embedding, least(neighbours, 100) + 1, duplicate_products.client, e.model_version) m
    where e.asset_id = any (ids) and m.asset_id > e.asset_id and m.similarity >= min_similarity);
end $$;

-- For the page and the questions ---------------------------------------------------------------

-- What people know an asset by. A title only where embedding_sources has a column of that name; an
-- image is cut, as some are data: URLs, and empty in the place of null.
create or replace function public.embedding_pictures(ids uuid[]) returns jsonb
language sql stable
set search_path = pg_catalog, public, extensions, pg_temp
as $$
  select coalesce(jsonb_agg(jsonb_build_object(
    'id', s.id, 'client', concat(s.client), 'title', concat(to_jsonb(s) ->> 'title'),
    'image', left(concat(s.image), case when cardinality(ids) > 500 then 2000 else 300000 end)
  )), '[]')
  from embedding_sources s where s.id = any (ids)
$$;

-- The assets nearest to a vector: match_products, with what people know them by.
create or replace function public.embedding_search(
  query_embedding vector(512), model_version text, client text default null, wanted int default 12
) returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, public, extensions, pg_temp
set statement_timeout = '55s'
as $$
declare
  matches jsonb;
  ids uuid[];
begin
  select coalesce(jsonb_agg(jsonb_build_object('id', m.asset_id, 'similarity', m.similarity)
      order by m.similarity desc), '[]'), array_agg(m.asset_id)
  into matches, ids
  from match_products(query_embedding, wanted, client, model_version) m;
  return jsonb_build_object('matches', matches, 'pictures', embedding_pictures(ids));
end $$;

-- Some assets, spread over the clients, each with its nearest; and "typical", the similarity of
-- assets that have nothing to do with each other.
drop function if exists public.embedding_gallery(text, text, int);  -- the version before
create or replace function public.embedding_gallery(
  model_version text, client text default null
) returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
set statement_timeout = '55s'
as $$
#variable_conflict use_column
declare
  ids uuid[];
  found jsonb;
begin
  ids := array(
    select id from (
      select s.id, row_number() over (
        partition by s.client order by hashtextextended(s.id::text, 1::bigint)) as turn
      from embedding_sources s join product_embeddings e on e.asset_id = s.id
      where e.model_version = embedding_gallery.model_version and e.embedding is not null
        and (embedding_gallery.client is null or s.client = embedding_gallery.client)
    ) spread order by turn, hashtextextended(id::text, 1::bigint) limit 16);
  found := (
    select coalesce(jsonb_agg(jsonb_build_object('id', s.id, 'nearest', (
        select coalesce(jsonb_agg(jsonb_build_object('id', n.asset_id, 'similarity', n.similarity)
          order by n.similarity desc), '[]')
        from similar_products(s.id, 6, embedding_gallery.client) n))
      order by s.client, s.id), '[]')
    from embedding_sources s where s.id = any (ids));
  return jsonb_build_object(
    'samples', found,
    'pictures', embedding_pictures(array(
      select distinct (jsonb_path_query(found, '$.**.id') #>> '{}')::uuid)),
    'typical', (
      select percentile_cont(0.5) within group (order by 1 - (a.embedding <=> b.embedding))
      from product_embeddings a join product_embeddings b on a.asset_id < b.asset_id
      where a.asset_id = any (ids) and b.asset_id = any (ids)));
end $$;

-- Pairs of assets that look the same. Copies (their vectors have the same signs) are sought among
-- 400,000, which takes a while; then each asset is compared with its nearest, until the seconds
-- are over: "looked_at" says how many of the "embedded" there was time for. Copies come paired with
-- the first of their kind alone, and that one stands for them all where assets are compared.
create or replace function public.embedding_pairs(
  model_version text, client text default null, min_similarity float8 default 0.99,
  seconds float8 default 6
) returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
set statement_timeout = '55s'
as $$
#variable_conflict use_column
declare
  most constant int := 50000;
  among constant int := 400000;
  deadline constant timestamptz := clock_timestamp() + seconds * interval '1 s';
  embedded bigint;
  looked_at int;
  ones uuid[];
  others uuid[];
  similarities float8[];
  asset uuid;
  near record;
begin
  with signs as materialized (
    -- Joined with the assets, vectors would be read in the ids' order, from all over the disk.
    select e.asset_id, hashtextextended(binary_quantize(e.embedding)::text, 0::bigint) as sign
    from product_embeddings e
    where e.model_version = embedding_pairs.model_version
      and (embedding_pairs.client is null or exists (
        select from embedding_sources s
        where s.id = e.asset_id and s.client = embedding_pairs.client))
    limit among
  ), kinds as (
    select array_agg(d.asset_id order by d.asset_id) as ids
    from signs d join embedding_sources s on s.id = d.asset_id
    where d.sign in (select sign from signs group by sign having count(*) > 1)
    group by d.sign
  ), copies as (
    select a.asset_id as one, b.asset_id as other, 1 - (a.embedding <=> b.embedding) as similarity
    from kinds k cross join unnest(k.ids[2:]) u (id)
    join product_embeddings a on a.asset_id = k.ids[1]
    join product_embeddings b on b.asset_id = u.id
    limit most
  )
  select array_agg(one), array_agg(other), array_agg(similarity)
  into ones, others, similarities
  from copies where similarity >= min_similarity;
  looked_at := coalesce(cardinality(others), 0);
  embedded := (
    select count(*) from product_embeddings e join embedding_sources s on s.id = e.asset_id
    where e.model_version = embedding_pairs.model_version and e.embedding is not null
      and (embedding_pairs.client is null or s.client = embedding_pairs.client));

  for asset in
    select e.asset_id from product_embeddings e join embedding_sources s on s.id = e.asset_id
    where e.model_version = embedding_pairs.model_version and e.embedding is not null
      and (embedding_pairs.client is null or s.client = embedding_pairs.client)
      and (others is null or e.asset_id <> all (others))
    order by e.asset_id limit most
  loop
    exit when clock_timestamp() > deadline;
    for near in select * from similar_products(asset, 5, embedding_pairs.client) loop
      if near.similarity >= min_similarity then
        ones := ones || asset;
        others := others || near.asset_id;
        similarities := similarities || near.similarity;
      end if;
    end loop;
    looked_at := looked_at + 1;
  end loop;
  return jsonb_build_object(
    'embedded', embedded,
    'sought_among', least(embedded, among),
    'looked_at', looked_at,
    'pairs', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'one', p.one, 'other', p.other, 'similarity', p.similarity)), '[]')
      from unnest(ones, others, similarities) p (one, other, similarity)),
    'pictures', embedding_pictures(array(select unnest(ones) union select unnest(others))));
end $$;

-- The assets that failed, after an id; go on with "last" until it is null.
create or replace function public.failed_assets(
  model_version text, client text default null, after uuid default null, wanted int default 2000
) returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, public, extensions, pg_temp
set plan_cache_mode = force_custom_plan
set statement_timeout = '55s'
as $$
#variable_conflict use_column
declare
  ids uuid[];
begin
  ids := array(
    select f.asset_id from embedding_failures f
    where f.model_version = failed_assets.model_version
      and (failed_assets.client is null or f.client = failed_assets.client)
      and (after is null or f.asset_id > after)
    order by f.asset_id limit wanted);
  return jsonb_build_object(
    'failures', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'id', f.asset_id, 'reason', f.reason, 'permanent', f.permanent) order by f.asset_id), '[]')
      from product_embedding_failures f where f.asset_id = any (ids)),
    'pictures', embedding_pictures(ids),
    'last', case when cardinality(ids) = wanted then ids[wanted] end);
end $$;

-- Who may call ---------------------------------------------------------------------------------

-- A function of one of our names that was there before, with other parameters: the API could not
-- tell which one is meant (PGRST203), and the app's own calls would end.
do $$
declare
  others text;
  cure text;
begin
  select string_agg(p.oid::regprocedure::text, ', '),
    string_agg(format('drop function public.%I(%s);', p.proname,
                      pg_get_function_identity_arguments(p.oid)), ' ')
  into others, cure
  from pg_proc p join pg_proc q using (pronamespace, proname)
  where p.pronamespace = 'public'::regnamespace and p.oid <> q.oid
    and p.proname = any (current_setting('embeddings.functions')::text[])
    and p.xmin <> pg_current_xact_id()::xid;  -- made by another transaction than this file's
  if others is not null then
    raise exception 'a function of that name is there already: %', others using hint =
      'Does your app call it? Then give it another name, there and in the app. Else: ' || cure;
  end if;
end $$;

-- The service role alone, whomever the default privileges name. (New functions may be called by
-- everyone.)
do $$
declare
  granted record;
begin
  for granted in
    select p.oid::regprocedure as function,
      case when a.grantee = 0 then 'public' else a.grantee::regrole::text end as grantee
    from pg_proc p cross join aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
    where p.pronamespace = 'public'::regnamespace and a.grantee <> p.proowner
      -- What you granted to a role of your own stays, but for functions with their owner's rights.
      and (p.prosecdef or a.grantee in (0, 'anon'::regrole, 'authenticated'::regrole,
        'service_role'::regrole))
      and (p.proname = any (current_setting('embeddings.functions')::text[])
        or p.oid = 'public.forget_embedding'::regproc)
  loop
    execute format(
      'revoke execute on function %s from %s cascade', granted.function, granted.grantee);
  end loop;
end $$;
grant execute on function
  public.embedding_status, public.pending_assets, public.store_embeddings, public.match_products,
  public.similar_products, public.duplicate_products, public.embedding_search,
  public.embedding_gallery, public.embedding_pairs, public.failed_assets,
  public.embedding_image_hash  -- for embedding_failures
  to service_role;

-- To let signed-in users search, and find what the policies on your assets show them, no more (run
-- it again after this file, which closes the search). Restrictive as well, so that a policy from
-- before, which may say "true", opens nothing:
--   grant select on public.embedding_sources, public.product_embeddings to authenticated;
--   grant execute on function public.match_products, public.similar_products to authenticated;
--   drop policy if exists "As the asset itself" on public.product_embeddings;
--   create policy "As the asset itself" on public.product_embeddings for select to authenticated
--     using (exists (select from public.embedding_sources s where s.id = asset_id));
--   drop policy if exists "Only as the asset itself" on public.product_embeddings;
--   create policy "Only as the asset itself" on public.product_embeddings as restrictive
--     for select to authenticated
--     using (exists (select from public.embedding_sources s where s.id = asset_id));
-- They need select on the assets, too. Visitors who are not signed in: let your server ask.

-- What the dashboard and the API's description say.
comment on function public.embedding_image_hash is
  'Part of the others: tells whether an image is still the same.';
comment on function public.embedding_shard is
  'Part of the others: the shard, from 1 to shards, that an asset belongs to.';
comment on function public.embedding_back_off is
  'Part of the others: how long a failure rests before it is tried again.';
comment on function public.embedding_status is
  'For generate_embeddings.py: counts assets, embeddings and failures.';
comment on function public.pending_assets is
  'For generate_embeddings.py: the next assets without an embedding, a page at a time.';
comment on function public.store_embedding_rows is
  'Part of store_embeddings: one batch, or one row of it.';
comment on function public.store_embeddings is
  'For generate_embeddings.py: stores embeddings and notes failures.';
comment on function public.forget_embedding is
  'Trigger on the assets: a new image forgets the embedding of the old one.';
comment on function public.match_products is
  'For the app: the assets whose images are nearest to a vector, nearest first.';
comment on function public.similar_products is
  'For the app: the assets that look most like this one, without itself.';
comment on function public.duplicate_products is
  'For the app''s server: pairs of assets that look the same, a page at a time.';
comment on function public.embedding_pictures is
  'Part of the others: what people know assets by.';
comment on function public.embedding_search is
  'For generate_embeddings.py --search: the assets nearest to a vector.';
comment on function public.embedding_gallery is
  'For generate_embeddings.py --gallery: some assets, each with its nearest.';
comment on function public.embedding_pairs is
  'For generate_embeddings.py --gallery: pairs of assets that look the same.';
comment on function public.failed_assets is
  'For generate_embeddings.py --gallery: the assets without an embedding, and why.';

-- Self-test ------------------------------------------------------------------------------------
--
-- What would fail in the night fails here: what the script and the app do is done once, as the role
-- that they have, and undone.

savepoint self_test;

-- The trigger's argument: a column of its table, in which there are ids of the view. A few of the
-- view are looked for in the table, and a few of the table in the view: either may lack most.
do $$
declare
  ids text[] := array(
    select s.id::text from embedding_sources s where s.image is not null limit 100);
  watching record;
  known boolean;
begin
  for watching in
    select tgrelid::regclass as relation,
      substring(pg_get_triggerdef(oid) from 'forget_embedding\(''(.*)''\)$') as id
    from pg_trigger
    where tgfoid = 'public.forget_embedding'::regproc and not tgisinternal and tgparentid = 0
  loop
    execute format(
      'select exists (select from %1$s t where t.%2$I::text = any ($1)) '
        'or exists (select from embedding_sources s where s.id::text in '
          '(select t.%2$I::text from %1$s t limit 100)) '
        'or not exists (select from %1$s)', watching.relation, watching.id) into known using ids;
    if ids <> '{}' and not known then
      raise exception '% holds no ids of embedding_sources', watching.id
      using errcode = 'undefined_column';
    end if;
  end loop;
exception when undefined_column or null_value_not_allowed then
  raise exception 'the trigger forget_embedding on %: %', watching.relation, sqlerrm using hint =
    'Its argument is the name of the column that holds the id, as it is spelled in the table and '
    'without double quotes. Is it left from an earlier run, on another table? '
    'drop trigger forget_embedding on ' || watching.relation || ';';
end $$;

do $$
declare
  some_vector constant text := '[' || rtrim(repeat('0.5,', 512), ',') || ']';
  -- A little longer than CLIP's name: a column that is too short for that is found.
  version constant text := 'self-test-of-schema.sql';
  asset jsonb;
  answer jsonb;
begin
  -- Supabase's postgres may act as service_role.
  begin
    set local role service_role;
  exception when insufficient_privilege then
    raise notice 'not tried as service_role, which % may not act for', current_user;
  end;

  perform embedding_status(version, '');
  asset := pending_assets(version, wanted => 1) -> 'assets' -> 0;
  if asset is not null then
    answer := store_embeddings(version, json_build_array(jsonb_build_object(
      'asset_id', asset -> 'id', 'image_hash', asset -> 'image_hash', 'embedding', some_vector
    ))) -> 0;
    if answer ->> 'outcome' = 'refused' then
      raise exception 'product_embeddings takes no row: %', answer ->> 'reason' using hint =
        'It must take rows of (asset_id, embedding, model_version): give its other columns a '
        'default, and see what its triggers and constraints do.';
    end if;
  end if;

  begin
    perform match_products(some_vector::vector, 1, model_version => version);
    perform similar_products(product_embeddings.asset_id, 0) from product_embeddings
      where product_embeddings.model_version = version limit 1;
    perform duplicate_products(client => ''), embedding_gallery(version, ''),
      embedding_pairs(version, ''), failed_assets(version, ''),
      embedding_search(some_vector::vector, version);
  exception when insufficient_privilege or undefined_object or undefined_function then
    raise exception 'the search fails for %: %', current_user, sqlerrm using hint =
      'It needs select on each table that embedding_sources reads, and usage on the schema of '
      'pgvector: grant select on TABLE to service_role; '
      'grant usage on schema extensions to service_role;';
  end;
end $$;

rollback to savepoint self_test;

notify pgrst, 'reload schema';
commit;
