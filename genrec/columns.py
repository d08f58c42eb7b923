"""Column names of every table that genrec reads or writes.

``*_item_id`` columns hold the user's own identifiers (string or integer, kept to the end);
``*_item_index`` columns hold rows of ``catalog.parquet``. The two are never mixed.
"""

# Who, what, when.
USER_ID = "user_id"
ITEM_ID = "item_id"
ITEM_INDEX = "item_index"
TIMESTAMP = "timestamp"  # int64 seconds since the epoch, null where the data has only an order
RATING = "rating"
EVENT = "event"  # view, cart, purchase, … where the source tells them apart
WEIGHT = "weight"  # of an interaction's event
SUMMARY = "summary"  # headline of the review that came with an interaction
REVIEW = "review"  # its body
QUERY = "query"  # the search that led to the interaction
POSITION = "position"  # 0, 1, … in the user's ordered sequence
TRAIN_COUNT = "train_count"  # catalogue: interactions in the training part

# Catalogue attributes. `categories` is a path, general to specific.
TITLE = "title"
BRAND = "brand"
CATEGORIES = "categories"
PRICE = "price"
DESCRIPTION = "description"

# Split rows: item indices, oldest first. A row supervises the items of `history + [target]`
# from position `supervise_from` on, so that each interaction is a target exactly once.
ROW_ID = "row_id"
HISTORY = "history_item_index"
TARGET = "target_item_index"
SUPERVISE_FROM = "supervise_from"
TARGET_TIME = "target_timestamp"
TARGET_POSITION = "target_position"  # place of the target in the user's ordered sequence
SEEN = "seen_item_index"  # all that the user had before the target, for filters
# Only where a row has several right answers (time-cutoff): the distinct items of the period, in
# the order of time; the first is the target.
RELEVANT = "relevant_item_index"

FUTURE = "future_item_index"  # RL rows: the target and what follows it in the training part

# Instruction rows. Lists hold item ids in files and item indices in memory.
TASK = "task"
TEMPLATE = "template"
PROMPT = "prompt"
COMPLETION = "completion"
TARGET_KIND = "target_kind"  # what the completion is; one of genrec.tasks.families.TARGET_KINDS
TARGETS = "targets"  # items that the completion is about, in its order
HISTORY_ITEMS = "history"  # what the user had before the prompt's moment, oldest first
CANDIDATES = "candidates"  # items to choose from
SHOWN = "shown"  # a history with noise in it
SET_ASIDE = "set_aside"  # the noise
HISTORY_RATINGS = "history_ratings"
INTENTION = "intention"
PREFERENCE = "preference"
TEXT_ORIGIN = "text_origin"  # of a query, intention or preference: data, rule or llm:<model>
STEPS = "steps"  # reasoning in typed slots; see genrec.tasks.rows.STEP_SLOTS

# Recommendations: one row per recommended item, `rank` starts at 1.
RANK = "rank"
SCORE = "score"  # summed log-probability under the declared normaliser
SID = "sid"
LEVEL_LOG_PROBS = "level_log_probs"
CERTIFIED = "certified"
PROMPT_SHA256 = "prompt_sha256"
