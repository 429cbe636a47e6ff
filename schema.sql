-- Image embeddings for the assets table: run it in Supabase's SQL editor; running it again does no
-- harm. Needs pgvector 0.8 or later.
--
-- It expects   public.assets (id uuid primary key, image_url text, client_name text).
-- Where yours differs, change it here before you run it:
--   * id is bigint or text: replace every "asset_id uuid" with "asset_id bigint" or "asset_id text"
--   * other names: replace "public.assets", "(id)", "new.id", "a.id", "image_url", "client_name"
--   * clients in another table: join that table in match_products and compare its column there

create schema if not exists extensions;
create extension if not exists vector with schema extensions;

-- Tables ---------------------------------------------------------------------------------------

-- One vector of unit length per asset. A row of another model_version counts as missing.
create table if not exists public.product_embeddings (
  asset_id uuid primary key references public.assets (id) on delete cascade,
  embedding extensions.vector(512) not null,
  model_version text not null,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);

-- Loading millions of rows for the first time? Drop this index before and create it after.
create index if not exists product_embeddings_embedding_hnsw
  on public.product_embeddings using hnsw (embedding extensions.vector_cosine_ops);

-- Why an asset has no embedding. Permanent failures (404, not an image, ...) are not tried again.
create table if not exists public.product_embedding_failures (
  asset_id uuid primary key references public.assets (id) on delete cascade,
  model_version text not null,
  stage text not null,
  reason text not null,
  permanent boolean not null,
  attempts int not null default 1,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);

-- Access: the service role alone (it bypasses row level security; no policy lets others in) -------

alter table public.product_embeddings enable row level security;
alter table public.product_embedding_failures enable row level security;

revoke all on public.product_embeddings, public.product_embedding_failures
  from public, anon, authenticated;
grant select, insert, update, delete
  on public.product_embeddings, public.product_embedding_failures to service_role;

-- Triggers -------------------------------------------------------------------------------------

-- A new image URL: forget what is known of the old image, so that the next run embeds the new one.
-- Security definer, because the app user who edits an asset has no rights on these tables.
create or replace function public.forget_asset_embedding() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  delete from public.product_embeddings e where e.asset_id = new.id;
  delete from public.product_embedding_failures f where f.asset_id = new.id;
  return null;
end $$;

create or replace trigger forget_asset_embedding
  after update of image_url on public.assets
  for each row when (old.image_url is distinct from new.image_url)
  execute function public.forget_asset_embedding();

-- Waits for a transaction that is changing the image URL just now. Else it would drop no row, as
-- ours is not there yet, and the vector of the old image would stay. (The script looks at the URL
-- again after it has stored a row.)
create or replace function public.await_image_change() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform from public.assets a where a.id = new.asset_id for share;
  return new;
end $$;

create or replace trigger await_image_change
  before insert or update on public.product_embeddings
  for each row execute function public.await_image_change();

create or replace trigger await_image_change
  before insert or update on public.product_embedding_failures
  for each row execute function public.await_image_change();

-- A success clears the asset's failure.
create or replace function public.clear_embedding_failure() returns trigger
language plpgsql set search_path = '' as $$
begin
  delete from public.product_embedding_failures f where f.asset_id = new.asset_id;
  return null;
end $$;

create or replace trigger clear_embedding_failure
  after insert or update on public.product_embeddings
  for each row execute function public.clear_embedding_failure();

-- No failure beside a vector: of two workers on one asset, the one that succeeds is right.
create or replace function public.skip_embedding_failure() returns trigger
language plpgsql set search_path = '' as $$
begin
  if exists (select from public.product_embeddings e
             where e.asset_id = new.asset_id and e.model_version = new.model_version) then
    return null;
  end if;
  return new;
end $$;

create or replace trigger skip_embedding_failure
  before insert on public.product_embedding_failures
  for each row execute function public.skip_embedding_failure();

-- A failure written again (an upsert) counts one more attempt.
create or replace function public.count_embedding_attempt() returns trigger
language plpgsql set search_path = '' as $$
begin
  new.attempts := old.attempts + 1;
  new.created_at := old.created_at;
  return new;
end $$;

create or replace trigger count_embedding_attempt
  before update on public.product_embedding_failures
  for each row execute function public.count_embedding_attempt();

-- Search ---------------------------------------------------------------------------------------

-- Loads pgvector into this session: until then only a superuser, which Supabase's postgres is not,
-- may give a function the setting hnsw.iterative_scan.
do $$ begin perform '[1]'::extensions.vector; end $$;

-- The assets whose images are nearest to a vector, nearest first; similarity is the cosine, 1 at
-- most. client and model_version narrow the search where they are given.
--
-- force_custom_plan: the planner must see match_count and the filters to choose between the HNSW
-- index and, for a client with few assets, an exact sort of those; a generic plan sorts the whole
-- table. iterative_scan: a filtered or long search goes on in the index until match_count rows are
-- found; without it the index gives 40 candidates and no more.
create or replace function public.match_products(
  query_embedding extensions.vector(512),
  match_count int default 10,
  client text default null,
  model_version text default null
) returns table (asset_id uuid, image_url text, similarity float8)
language plpgsql stable
set search_path = ''
set plan_cache_mode = 'force_custom_plan'
set hnsw.iterative_scan = 'strict_order'
as $$
#variable_conflict use_column
begin
  return query
    select e.asset_id, a.image_url,
           1 - (e.embedding operator(extensions.<=>) match_products.query_embedding)
    from public.product_embeddings e
    join public.assets a on a.id = e.asset_id
    where (match_products.client is null or a.client_name = match_products.client)
      and (match_products.model_version is null
           or e.model_version = match_products.model_version)
    order by e.embedding operator(extensions.<=>) match_products.query_embedding
    limit match_products.match_count;
end $$;

-- The assets that look most like this one, without itself; none if it has no embedding yet.
create or replace function public.similar_products(asset_id uuid, match_count int default 10)
returns table (asset_id uuid, image_url text, similarity float8)
language sql stable
set search_path = ''
as $$
  select m.asset_id, m.image_url, m.similarity
  from public.product_embeddings e
  cross join lateral public.match_products(
    e.embedding, similar_products.match_count + 1, null, e.model_version) m
  where e.asset_id = similar_products.asset_id and m.asset_id <> e.asset_id
  order by m.similarity desc
  limit similar_products.match_count
$$;

-- The service role alone may call these (Supabase grants new functions to everyone). To open one to
-- signed-in users, add "security definer" to it above, which lets it read every asset whatever the
-- policies on assets say, and "grant execute on function public.NAME to authenticated;" below.
revoke execute on function
  public.forget_asset_embedding, public.clear_embedding_failure, public.skip_embedding_failure,
  public.count_embedding_attempt, public.await_image_change,
  public.match_products, public.similar_products
  from public, anon, authenticated;
grant execute on function public.match_products, public.similar_products to service_role;

-- Lets PostgREST see the new tables and functions at once.
notify pgrst, 'reload schema';
