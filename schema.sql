-- Image embeddings of products: what generate_embeddings.py needs in the database, and the search.
--
-- Run this file in Supabase's SQL editor, by psql, or as a migration. It runs as a whole or changes
-- nothing. Running it again does no harm. It needs pgvector 0.8.
-- It expects a table public.assets (id uuid primary key, image_url text, client_name text). For
-- another table change "Your tables". If your ids are bigint or text, replace the word uuid there.
-- Examples for other tables are near the end. So are the lines that remove it all.
--
-- It creates these in the schema public:
--   tables product_embeddings, product_embedding_failures, and a view of these, embedding_failures
--   embedding_sources(), which reads your tables; nothing else names them
--   match_products(), similar_products(), duplicate_products() for your app
--   embedding_status(), pending_assets(), store_embeddings(), embedding_copies() for the script
--   embedding_image_hash(), embedding_shard(), which are parts of the others
-- A vector and its index take about 5.5 KB: 500 MB hold some 90,000 products. Your tables get no
-- trigger, and their rows no lock. Only the service role may call the functions, by its own rights.

begin;
set local search_path = public, extensions;
set local lock_timeout = '2s';  -- it keeps nobody waiting for longer
set local client_min_messages = warning;

create schema if not exists extensions;
create extension if not exists vector with schema extensions;
grant usage on schema public, extensions to service_role;
-- Is pgvector in another schema than these two? alter extension vector set schema extensions;

do $$ begin
  if to_regclass('public.embedding_sources') is not null then
    raise exception 'an earlier version is installed' using hint =
      'First run the lines at the end of this file, "How to remove it", but not the last one.';
  end if;
end $$;

-- Your tables ----------------------------------------------------------------------------------
-- What the script embeds: a product's id, image, client, title, and a link to its page. All but the
-- id are text. Put null::text for what you don't have. An image is a full URL, a data: URL, or a
-- path in the project's own storage, from /storage/v1/ on. A text that differs is a new picture, so
-- the same picture must read the same in each run. PostgreSQL looks up these names at each call:
-- your migrations may change the columns' types, and rename and replace the tables.
create or replace function public.embedding_sources()
returns table (id uuid, image text, client text, title text, link text)
language sql stable as $$
  select a.id, a.image_url::text, a.client_name::text, null::text, null::text
  from public.assets a
$$;
grant select on public.assets to service_role;  -- and on each other table that is read above

-- Our tables. With a product its rows are deleted, too. No key can refer to a view, a foreign or
-- partitioned table, or a column that is not unique: then leave out "references ... cascade".
create table if not exists public.product_embeddings (
  asset_id uuid primary key references public.assets (id) on delete cascade on update cascade,
  embedding vector(512) not null,
  model_version text not null,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  embedded_image_hash bigint  -- null, from an older program: of any image
);
alter table public.product_embeddings enable row level security;

create table if not exists public.product_embedding_failures (
  asset_id uuid primary key references public.assets (id) on delete cascade on update cascade,
  model_version text not null,
  image_hash bigint not null,
  stage text not null,
  reason text not null,
  attempts int not null default 1,
  next_attempt timestamptz not null default now(),
  updated_at timestamptz not null default now()
);
alter table public.product_embedding_failures enable row level security;

-- ====== "Your tables" end here. A later version of the file replaces all that stands below. ======

-- For tables from before this file. "If not exists" of an index looks only at the name.
alter table public.product_embeddings add column if not exists embedded_image_hash bigint,
  alter column created_at set default now(), alter column updated_at set default now();
alter table public.product_embedding_failures add column if not exists image_hash bigint,
  add column if not exists next_attempt timestamptz not null default now();
create unique index if not exists product_embeddings_pkey on public.product_embeddings (asset_id);

-- Index ----------------------------------------------------------------------------------------
-- A full table is not indexed here: that takes long, and keeps deletes of products waiting.
do $$ begin
  if (select count(*) from (select from product_embeddings limit 5001) few) <= 5000 then
    create index if not exists product_embeddings_embedding_hnsw
      on product_embeddings using hnsw (embedding vector_cosine_ops);
  end if;
end $$;

-- Millions of products load faster without it:
--   drop index public.product_embeddings_embedding_hnsw;
-- Make it afterwards, by psql over the direct connection: the SQL editor gives up too soon.
--   set statement_timeout = 0; set maintenance_work_mem = '4GB';  -- the server must have it
--   set max_parallel_maintenance_workers = 0;  -- needed before pgvector 0.8.2 (CVE-2026-3172)
--   drop index if exists public.product_embeddings_embedding_hnsw;  -- of a build that was cut off
--   create index concurrently product_embeddings_embedding_hnsw
--     on public.product_embeddings using hnsw (embedding extensions.vector_cosine_ops);

-- Access: the service role, which needs no policy (the advisor's notice 0008) --------------------
revoke all on public.product_embeddings, public.product_embedding_failures
  from public, anon, authenticated;
grant select, insert, update, delete
  on public.product_embeddings, public.product_embedding_failures to service_role;

-- For the script -------------------------------------------------------------------------------
-- use_column: a name that a column and a parameter share means the column. The parameter reads
-- pending_assets.client. force_custom_plan: the best plan depends on which parameters are null.

-- Tells whether an image is still the same. It must become a part of the query, and so can't have a
-- search_path of its own (the advisor's warning 0011; as embedding_shard and embedding_sources).
create or replace function public.embedding_image_hash(image text) returns bigint
language sql immutable parallel safe return hashtextextended(coalesce(image, ''), 0::bigint);

-- The part of the products, from 1 to shards, that an id is in.
create or replace function public.embedding_shard(id text, shards int) returns int
language sql immutable parallel safe
return 1 + (hashtextextended(id, 0::bigint) & 9223372036854775807) % shards;

-- The failures that still hold: this image failed, and has no vector. Long texts are cut.
create or replace view public.embedding_failures with (security_invoker = true) as
  select f.asset_id, left(s.image, 2000) as image, left(s.client, 2000) as client,
    left(s.title, 200) as title, left(s.link, 2000) as link, f.model_version, f.stage, f.reason,
    f.attempts, f.next_attempt, f.updated_at
  from public.product_embedding_failures f join public.embedding_sources() s on s.id = f.asset_id
  where f.image_hash = public.embedding_image_hash(s.image) and not exists (
    select from public.product_embeddings e
    where e.asset_id = f.asset_id and e.model_version = f.model_version
      and (e.embedded_image_hash is null or e.embedded_image_hash = f.image_hash));
revoke all on public.embedding_failures from public, anon, authenticated;
grant select on public.embedding_failures to service_role;

-- Counts the products of a client and a shard. "failed" have no vector and failed before; of these,
-- "waiting" are not due yet. If the client has no product, "clients" holds names of others.
create or replace function public.embedding_status(
  model_version text, client text default null, shard int default 1, shards int default 1
) returns jsonb
language plpgsql stable set search_path = public, extensions
set plan_cache_mode = force_custom_plan set statement_timeout = '55s' as $$
#variable_conflict use_column
begin
  return (
    select jsonb_build_object(
      'contract', 3,  -- CONTRACT in generate_embeddings.py
      'time', now(), 'assets', count(*), 'done', count(e.asset_id),
      'failed', count(f.asset_id) filter (where e.asset_id is null),
      'waiting', count(*) filter (where e.asset_id is null and f.next_attempt > now()),
      'next_attempt', min(f.next_attempt)
        filter (where e.asset_id is null and f.next_attempt > now()),
      'clients', case when count(*) = 0 and embedding_status.client is not null and not exists (
          select from embedding_sources() c where c.client = embedding_status.client) then (
        select coalesce(jsonb_agg(name), '[]')
        from (select distinct c.client as name from embedding_sources() c limit 1000) names) end)
    from embedding_sources() s
    left join product_embeddings e
      on e.asset_id = s.id and e.model_version = embedding_status.model_version
      and (e.embedded_image_hash is null or e.embedded_image_hash = embedding_image_hash(s.image))
    left join product_embedding_failures f
      on f.asset_id = s.id and f.model_version = embedding_status.model_version
      and f.image_hash = embedding_image_hash(s.image)
    where (embedding_status.client is null or s.client = embedding_status.client)
      and (shards = 1 or embedding_shard(s.id::text, shards) = shard));
end $$;

-- The next products to embed, after an id: those that never failed, or those that failed before a
-- time and are due again. One value, as the API cuts lists of rows; go on with "last" until it is
-- null. It holds 8 MB of images at most, as some are data: URLs. A longer one is cut.
create or replace function public.pending_assets(
  model_version text, client text default null,
  after public.product_embeddings.asset_id%type default null, wanted int default 250,
  failed_before timestamptz default null, waiting_too boolean default false,
  shard int default 1, shards int default 1
) returns jsonb
language plpgsql stable set search_path = public, extensions
set plan_cache_mode = force_custom_plan set statement_timeout = '55s' as $$
#variable_conflict use_column
declare most constant int := 8000000;
begin
  return (
    with found as materialized (
      select s.id, s.image, s.title
      from embedding_sources() s
      left join product_embedding_failures f
        on f.asset_id = s.id and f.model_version = pending_assets.model_version
        and f.image_hash = embedding_image_hash(s.image)
      where (pending_assets.client is null or s.client = pending_assets.client)
        and (after is null or s.id > after)
        and (shards = 1 or embedding_shard(s.id::text, shards) = shard)
        and case when failed_before is null then f.asset_id is null else
          f.updated_at < failed_before and (waiting_too or f.next_attempt <= failed_before) end
        and not exists (
          select from product_embeddings e
          where e.asset_id = s.id and e.model_version = pending_assets.model_version
            -- "::int <> 0" tells the planner that few hashes differ. By itself it expects half.
            and (e.embedded_image_hash is null
              or e.embedded_image_hash = embedding_image_hash(s.image))::int <> 0)
      order by s.id limit wanted
    ), sized as (
      select *, sum(case when bytes > most then most / 8 else bytes end) over (order by id) as total
      from found cross join lateral (select octet_length(coalesce(image, '')) as bytes) size
    )
    select jsonb_build_object(
      'assets', coalesce(jsonb_agg(jsonb_build_object(
        'id', id, 'image', case when bytes > most then left(image, 100) else image end,
        'image_hash', embedding_image_hash(image), 'bytes', bytes, 'title', left(title, 200)
      ) order by id), '[]'),
      'last', case when count(*) = wanted or count(*) < (select count(*) from found)
        then (array_agg(id order by id desc))[1] end)
    from sized where total <= most);
end $$;

-- Stores vectors and notes failures. Not taken are products whose image changed or that are gone,
-- and failures of an image that has a vector. A failure is tried again by the next run, then after
-- 1, 2, 4, ... hours, at most 30 days. A vector stays until a better one takes its place.
create or replace function public.store_embeddings(
  model_version text, vectors json default '[]', failures json default '[]'
) returns jsonb
language plpgsql set search_path = public, extensions
set plan_cache_mode = force_generic_plan set statement_timeout = '55s' as $$
#variable_conflict use_column
declare answer jsonb;
begin
  with stored as (
    insert into product_embeddings as e (asset_id, embedding, model_version, embedded_image_hash)
    select v.asset_id, v.embedding, store_embeddings.model_version, v.embedded_image_hash
    from json_populate_recordset(null::product_embeddings, vectors) v
    join embedding_sources() s
      on s.id = v.asset_id and embedding_image_hash(s.image) = v.embedded_image_hash
    order by v.asset_id  -- so that two runs never wait for each other
    on conflict (asset_id) do update set
      embedding = excluded.embedding, model_version = excluded.model_version,
      embedded_image_hash = excluded.embedded_image_hash, updated_at = now()
    returning e.asset_id
  ), mended as (
    delete from product_embedding_failures f using stored where f.asset_id = stored.asset_id
  ), noted as (
    insert into product_embedding_failures as f (asset_id, model_version, image_hash, stage, reason)
    select n.asset_id, store_embeddings.model_version, n.image_hash, n.stage, n.reason
    from json_populate_recordset(null::product_embedding_failures, failures) n
    join embedding_sources() s
      on s.id = n.asset_id and embedding_image_hash(s.image) = n.image_hash
    where not exists (
      select from product_embeddings e
      where e.asset_id = n.asset_id and e.model_version = store_embeddings.model_version
        and (e.embedded_image_hash is null or e.embedded_image_hash = n.image_hash))
    order by n.asset_id
    on conflict (asset_id) do update set
      model_version = excluded.model_version, image_hash = excluded.image_hash,
      stage = excluded.stage, reason = excluded.reason, updated_at = now(),
      (attempts, next_attempt) = (
        select before + 1, now() + least(trunc(2 ^ (before - 1)), 720) * interval '1 hour'
        from (select case when (f.model_version, f.image_hash)
          = (excluded.model_version, excluded.image_hash) then least(f.attempts, 99) else 0 end
        ) known (before))
    returning f.asset_id
  )
  select jsonb_build_object('taken', coalesce(jsonb_agg(asset_id), '[]'),
    'given', json_array_length(vectors) + json_array_length(failures)) into answer
  from (select asset_id from stored union all select asset_id from noted) ids;
  return answer;
end $$;

-- Search ---------------------------------------------------------------------------------------
-- The products whose images are nearest to a vector, nearest first, 1,000 at most. "similarity" is
-- the cosine: 1 for the same image. The search goes on in the index until it has enough or has seen
-- 40,000. (It sets that for the transaction: a "set" of the function can't be restored from a dump.
-- plpgsql_check warns of it. No row is changed.)
create or replace function public.match_products(
  query_embedding vector(512), match_count int default 10, inout client text default null,
  model_version text default null, max_similarity float8 default null,
  other_than public.product_embeddings.asset_id%type default null,
  out asset_id public.product_embeddings.asset_id%type, out image text, out title text,
  out link text, out similarity float8
) returns setof record
language plpgsql stable set search_path = public, extensions
set plan_cache_mode = force_custom_plan as $$
#variable_conflict use_column
begin
  perform set_config('hnsw.iterative_scan', 'strict_order', true),
    set_config('hnsw.max_scan_tuples', '40000', true),
    set_config('hnsw.scan_mem_multiplier', '4', true);
  return query
    select s.client, s.id, s.image, s.title, s.link, 1 - (e.embedding <=> query_embedding)
    from product_embeddings e join embedding_sources() s on s.id = e.asset_id
    where (match_products.client is null or s.client = match_products.client)
      and (match_products.model_version is null or e.model_version = match_products.model_version)
      and (max_similarity is null or 1 - (e.embedding <=> query_embedding) <= max_similarity)
      and (other_than is null or e.asset_id <> other_than)
    order by e.embedding <=> query_embedding
    limit least(match_count, 1000);
end $$;

-- The products that look most like this one. max_similarity => 0.99 leaves out copies of its image.
create or replace function public.similar_products(
  asset_id public.product_embeddings.asset_id%type, match_count int default 10,
  client text default null, max_similarity float8 default null
) returns table (asset_id public.product_embeddings.asset_id%type, image text, client text,
  title text, link text, similarity float8)
language sql stable set search_path = public, extensions as $$
  select n.asset_id, n.image, n.client, n.title, n.link, n.similarity
  from product_embeddings e cross join lateral match_products(e.embedding, match_count,
    similar_products.client, e.model_version, max_similarity, e.asset_id) n
  where e.asset_id = similar_products.asset_id
$$;

-- Pairs of products that look the same, each pair once, the most similar ones first. A product is
-- compared with the nearest few, "neighbours". "same": the vectors are equal. It is fast enough for
-- some 10,000 products. For more, ask for parts: duplicate_products(0.97, shard => 1, shards => 9)
create or replace function public.duplicate_products(
  min_similarity float8 default 0.97, client text default null, neighbours int default 5,
  shard int default 1, shards int default 1
) returns table (asset_id public.product_embeddings.asset_id%type, image text, client text,
  title text, link text, duplicate_id public.product_embeddings.asset_id%type,
  duplicate_image text, duplicate_client text, duplicate_title text, duplicate_link text,
  similarity float8, same boolean)
language sql stable set search_path = public, extensions set statement_timeout = '55s' as $$
  select s.*, n.asset_id, n.image, n.client, n.title, n.link, n.similarity,
    e.embedding = (select d.embedding from product_embeddings d where d.asset_id = n.asset_id)
  from product_embeddings e join embedding_sources() s on s.id = e.asset_id
  cross join lateral match_products(e.embedding, neighbours, duplicate_products.client,
    e.model_version, null, e.asset_id) n
  where (duplicate_products.client is null or s.client = duplicate_products.client)
    and (shards = 1 or embedding_shard(s.id::text, shards) = shard)
    and n.similarity >= min_similarity and n.asset_id > e.asset_id
  order by n.similarity desc
$$;

-- For the script's page, in one value: copies among 400,000 products, whose vectors have the same
-- signs. Each is paired with the first of its kind, as rows of duplicate_products.
create or replace function public.embedding_copies(
  model_version text, client text default null, min_similarity float8 default 0.99
) returns jsonb
language sql stable set search_path = public, extensions set statement_timeout = '55s' as $$
  with signs as materialized (
    select e.asset_id, hashtextextended(binary_quantize(e.embedding)::text, 0::bigint) as sign
    from product_embeddings e
    where e.model_version = embedding_copies.model_version and (
      embedding_copies.client is null or e.asset_id in (
        select s.id from embedding_sources() s where s.client = embedding_copies.client))
    limit 400000
  ), kinds as (
    select first_value(asset_id) over (partition by sign order by asset_id) as first,
      asset_id as other from signs
  ), pairs as (
    select s.id as asset_id, left(s.image, 2000) as image, left(s.client, 200) as client,
      left(s.title, 200) as title, left(s.link, 2000) as link, t.id as duplicate_id,
      left(t.image, 2000) as duplicate_image, left(t.client, 200) as duplicate_client,
      left(t.title, 200) as duplicate_title, left(t.link, 2000) as duplicate_link,
      1 - (a.embedding <=> b.embedding) as similarity, a.embedding = b.embedding as same
    from (select * from kinds where first <> other limit 20000) k
    join product_embeddings a on a.asset_id = k.first join embedding_sources() s on s.id = k.first
    join product_embeddings b on b.asset_id = k.other join embedding_sources() t on t.id = k.other
  )
  select jsonb_build_object('sought_among', (select count(*) from signs), 'pairs', coalesce(
    (select jsonb_agg(p) from pairs p where p.similarity >= min_similarity), '[]'))
$$;

-- Who may call ---------------------------------------------------------------------------------
-- The API can't tell functions of one name apart: the app's own calls would fail.
do $$ declare ours text; begin
  foreach ours in array '{embedding_sources, embedding_image_hash, embedding_shard,
    embedding_status, pending_assets, store_embeddings, match_products, similar_products,
    duplicate_products, embedding_copies}'::text[]
  loop
    if (select count(*) from pg_proc
        where proname = ours and pronamespace = 'public'::regnamespace) > 1 then
      raise exception 'there is another function %', ours using hint =
        'Does your app call it? Then give it another name, there and in the app.';
    end if;
    execute format('revoke execute on function public.%I from public, anon, authenticated', ours);
    execute format('grant execute on function public.%I to service_role', ours);
  end loop;
end $$;

-- For signed-in users, who find what the policies on your tables show them. They need select there,
-- too. This file closes the search again, so run these lines after it.
--   grant select on public.product_embeddings to authenticated;
--   grant execute on function public.embedding_sources, public.match_products,
--     public.similar_products to authenticated;
--   drop policy if exists "As the asset itself" on public.product_embeddings;
--   create policy "As the asset itself" on public.product_embeddings for select to authenticated
--     using (exists (select from public.embedding_sources() s where s.id = asset_id));

notify pgrst, 'reload schema';
commit;

-- What there is, and what is amiss.
with seen as materialized (
  select public.embedding_status('clip-vit-base-patch32') as counts,
    (select count(*) - count(distinct id) from public.embedding_sources()) as doubles
)
select 'products' as what, counts ->> 'assets' as found from seen
union all select 'with a vector', counts ->> 'done' from seen
union all select 'to embed', ((counts ->> 'assets')::int - (counts ->> 'done')::int)::text from seen
union all select 'AMISS: ids that come twice or are null', doubles::text from seen where doubles > 0
union all select 'AMISS: pgvector is older than 0.8', extversion from pg_extension
  where extname = 'vector' and string_to_array(extversion, '.')::int[] < '{0,8}'
union all select 'AMISS: no valid HNSW index', 'see "Index"' where not exists (
  select from pg_index join pg_class c on c.oid = indexrelid join pg_am m on m.oid = c.relam
  where indrelid = 'public.product_embeddings'::regclass and indisvalid and amname = 'hnsw')
union all select 'AMISS: a policy opens ' || tablename, policyname from pg_policies
  where schemaname = 'public' and policyname not like '%as the asset itself'
    and tablename in ('product_embeddings', 'product_embedding_failures')
union all select 'AMISS: vectors that no new image replaces, see "Moved pictures"', count(*)::text
  from public.product_embeddings where embedded_image_hash is null having count(*) > 0;

-- Examples for "Your tables" -------------------------------------------------------------------
-- In the place of a.image_url::text:
--   trim(split_part(a.images, ',', 1))                  -- the first of "a.jpg, b.jpg"
--   a.images[1]                                         -- the first of an array
--   a.images ->> 0                                      -- the first of a JSON array
--   '/storage/v1/object/public/photos/' || a.image_path -- in the bucket "photos", if private, too
--   a.image_url || '#' || a.image_version               -- for pictures that are overwritten
--   (select p.url from public.photos p where p.asset_id = a.id order by p.position, p.url limit 1)
-- In the place of a.client_name::text or null::text:
--   (select c.name from public.clients c where c.id = a.client_id)
--   'https://shop.example/products/' || a.id
-- After public.assets a:
--   where a.published and a.deleted_at is null
-- Many products with photos in a table of their own, and many clients, need indexes:
--   create index on public.photos (asset_id, position, url);
--   create index on public.assets (client_name);
-- Without a foreign key the rows of deleted products stay. No search finds them. To delete them:
--   delete from public.product_embeddings e
--     where not exists (select from public.embedding_sources() s where s.id = e.asset_id);
-- Another table took the place of yours? Keys still refer to the old one. For both of our tables:
--   alter table public.product_embeddings drop constraint product_embeddings_asset_id_fkey,
--     add foreign key (asset_id) references public.assets on delete cascade on update cascade;
-- To empty your table, and ours: truncate public.assets cascade.
-- drizzle-kit push removes what it does not know: put ours into its tablesFilter, each with a "!".
-- Moved pictures are the same under new URLs. This keeps their vectors:
--   update public.product_embeddings e
--     set embedded_image_hash = public.embedding_image_hash(s.image)
--     from public.embedding_sources() s where s.id = e.asset_id;

-- How to remove it -----------------------------------------------------------------------------
-- Before an upgrade run these lines, but not the last one, which removes the vectors:
--   drop policy if exists "As the asset itself" on public.product_embeddings;
--   drop policy if exists "Only as the asset itself" on public.product_embeddings;
--   drop view if exists public.embedding_failures;
--   drop view if exists public.embedding_sources;
--   drop function if exists public.forget_embedding cascade;  -- with triggers on your tables
--   drop function if exists public.match_products, public.similar_products,
--     public.duplicate_products, public.embedding_copies, public.embedding_search,
--     public.embedding_gallery, public.embedding_pairs, public.embedding_pictures,
--     public.failed_assets, public.embedding_status, public.pending_assets,
--     public.store_embeddings, public.store_embedding_rows, public.embedding_back_off,
--     public.embedding_sources, public.embedding_shard, public.embedding_image_hash;
--   alter table if exists public.product_embedding_failures drop column if exists permanent;
--   drop table if exists public.product_embedding_failures, public.product_embeddings;
