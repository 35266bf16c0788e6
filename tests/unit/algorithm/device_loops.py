"""The operations of the device's round as plain loops over numbers: slow, and obvious."""

from __future__ import annotations

import itertools
import math

from torch import Tensor


def outcome_lookup(
    accepted_keys: Tensor,
    bonus_keys: Tensor,
    drafts: Tensor,
    depth: Tensor,
    slots: Tensor,
    accepted: Tensor,
    bonus: Tensor,
) -> tuple[list[int], list[list[int]], list[int]]:
    branch, tokens, ready = [], [], []
    num_drafts = drafts.shape[2]
    for slot, k, token in zip(slots.tolist(), accepted.tolist(), bonus.tolist(), strict=True):
        keys = list(zip(accepted_keys[slot].tolist(), bonus_keys[slot].tolist(), strict=True))
        if k >= 0 and (k, token) in keys:
            n = keys.index((k, token))
            count = int(depth[slot])
            branch.append(n)
            tokens.append(drafts[slot, n].tolist()[:count] + [token] * (num_drafts - count))
            ready.append(count)
        else:
            branch.append(-1)
            tokens.append([token] * num_drafts)
            ready.append(0)
    return branch, tokens, ready


def settle_outcomes(
    alive: Tensor,
    read: Tensor,
    length: Tensor,
    admitted: Tensor,
    tail: Tensor,
    accepted_keys: Tensor,
    bonus_keys: Tensor,
    drafts: Tensor,
    depth: Tensor,
    slots: Tensor,
    accepted: Tensor,
    bonus: Tensor,
    lengths: Tensor,
    max_length: int,
    vocab_size: int,
    branch: Tensor,
    speculation: Tensor,
    tokens: Tensor,
    ready: Tensor,
) -> None:
    num_drafts = drafts.shape[2]
    for row, slot in enumerate(slots.tolist()):
        k, token, now = int(accepted[row]), int(bonus[row]), int(lengths[row])
        branch[row], ready[row] = -1, 0
        speculation[row] = tokens[row] = token if k >= 0 else 0
        if k < 0:
            continue
        if now != length[slot] + k + 1 or now > max_length or not 0 <= token < vocab_size:
            alive[slot] = False
        length[slot] = now
        if alive[slot] and not read[slot]:
            place = now - 1 - int(admitted[slot])
            if k == 0 and 0 <= place < tail.shape[1]:
                tail[slot, place] = token
            else:
                alive[slot] = False
        elif alive[slot] and depth[slot] == num_drafts:
            keys = list(zip(accepted_keys[slot].tolist(), bonus_keys[slot].tolist(), strict=True))
            if (k, token) in keys:
                branch[row], ready[row] = keys.index((k, token)), num_drafts
                speculation[row] = tokens[row] = drafts[slot, branch[row]]


def outcomes_in_order(
    candidates: Tensor, log_q: Tensor, drafts: Tensor, n: Tensor, accept: Tensor, room: Tensor
) -> list[list[tuple[int, int, float]]]:
    """Each row's possible outcomes (k, t*, log P), the likeliest first."""
    rows = []
    for b in range(candidates.shape[0]):
        outcomes = []
        for k in range(min(int(n[b]), int(room[b]) - 1) + 1):
            q = {int(t): math.exp(float(v)) for t, v in zip(candidates[b, k], log_q[b, k], strict=True)}
            p = math.prod(float(a) for a in accept[b, :k])
            if k < int(n[b]):
                p *= 1 - float(accept[b, k])
                q.pop(int(drafts[b, k]), None)
            total = sum(q.values())
            outcomes += [(k, t, math.log(p * v / total)) for t, v in q.items() if p * v > 0]
        rows.append(sorted(outcomes, key=lambda outcome: -outcome[2]))
    return rows


def fork(
    main: Tensor, private: Tensor, slots: Tensor, lengths: Tensor, accepted: Tensor, block_size: int
) -> tuple[list[list[int]], list[int], list[int]]:
    tables, source, destination = [], [], []
    width = main.shape[1]
    for slot, length, row in zip(slots.tolist(), lengths.tolist(), accepted.tolist(), strict=True):
        for n, k in enumerate(row):
            text, own = main[slot].tolist(), private[slot, n].tolist()
            first, inside = divmod(length + k, block_size) if k >= 0 else (0, 0)
            table = (text[:first] + own)[:width]
            table += [own[-1]] * (width - len(table))
            copied = inside > 0 and first < width
            tables.append(table)
            source.append(text[first] if copied else -1)
            destination.append(own[0] if copied else -1)
    return tables, source, destination


def copy_blocks(pages: Tensor, source: Tensor, destination: Tensor) -> None:
    before = pages.clone()
    for layer in range(pages.shape[0]):
        for a, b in zip(source.tolist(), destination.tolist(), strict=True):
            if a >= 0:
                pages[layer, b] = before[layer, a]


def adopt(main: Tensor, private: Tensor, slots: Tensor, branch: Tensor, first: Tensor) -> None:
    for slot, n, entry in zip(slots.tolist(), branch.tolist(), first.tolist(), strict=True):
        for p in range(private.shape[2]):
            if n >= 0 and entry + p < main.shape[1]:
                mine, yours = int(private[slot, n, p]), int(main[slot, entry + p])
                main[slot, entry + p], private[slot, n, p] = mine, yours


def branch_step(
    tokens: Tensor,
    positions: Tensor,
    tables: Tensor,
    block_size: int,
    limit: int,
    input_ids: Tensor,
    lengths: Tensor,
    slot_mapping: Tensor,
) -> None:
    for x in range(tokens.shape[0]):
        positions[x] += 1
        position = int(positions[x])
        input_ids[x] = tokens[x]
        lengths[x] = min(position + 1, limit)
        if position < limit:
            slot_mapping[x] = int(tables[x, position // block_size]) * block_size + position % block_size
        else:
            slot_mapping[x] = -1


def take_drafts(
    before: Tensor,
    head: Tensor,
    body: Tensor,
    after: Tensor,
    state: Tensor,
    slots: Tensor,
    accepted: Tensor,
    verified: Tensor,
    bonus: Tensor,
    lengths: Tensor,
    vocab_size: int,
    rows: Tensor,
    stamps: Tensor,
    branch: Tensor,
    tokens: Tensor,
    ready: Tensor,
) -> None:
    num_drafts = tokens.shape[1]
    branches = body.shape[1] // (1 + num_drafts)
    for row, slot in enumerate(slots.tolist()):
        generation, round_, under_verification = state[slot].tolist()
        _, of_generation, of_round, count, depth, _ = head[row].tolist()
        k, token = int(accepted[row]), min(max(int(bonus[row]), 0), vocab_size - 1)
        awaited = generation > 0 and (of_generation, of_round) == (generation, round_)
        whole = int(before[row]) == int(after[row]) and int(before[row]) % 2 == 0
        hit, drafted = 0, [token] * num_drafts
        given = 0
        if awaited and whole and 0 <= count <= branches and 0 <= depth <= num_drafts and k >= 0:
            keys = [divmod(word, 2**32) for word in body[row, :count].tolist()]
            if (k, token) in keys:
                hit = keys.index((k, token))
                its = [word % 2**32 for word in body[row, branches + hit :: branches].tolist()[:depth]]
                if all(draft < vocab_size for draft in its):
                    given, drafted = depth, its + [token] * (num_drafts - depth)
        judged = min(under_verification, int(verified[row]))
        values = [slot, generation, round_, k, judged, token, int(lengths[row]), given, *drafted]
        for word, value in enumerate(values):
            rows[row, word] = value
        for word, value in enumerate((generation, round_, int(before[row]))):
            stamps[row, word] = value
        branch[row], ready[row] = hit, given
        for j, draft in enumerate(drafted):
            tokens[row, j] = draft
        if k >= 0:
            state[slot, 1], state[slot, 2] = round_ + 1, given


def seal_record(record: Tensor, rows: int, row_words: int, number: int, head: int) -> None:
    total = head
    for i, word in enumerate(record[3 : 3 + rows * row_words].tolist()):
        total += word * (2 * i + 1) * 0x2545F491
    signed = (total + 2**63) % 2**64 - 2**63
    record[0], record[1], record[2] = number, rows, signed


def agreed(
    drawn: Tensor, drafts: Tensor, begins: Tensor, places: Tensor, num_speculative_tokens: int
) -> tuple[list[list[int]], list[int]]:
    tokens, counts, bounds = [], [], begins.tolist()
    for begin, end in itertools.pairwise(bounds):
        says, fed = drawn[begin:end].tolist(), drafts[begin + 1 : end].tolist()
        assert places[begin:end].tolist() == list(range(end - begin))
        same = next((i for i, draft in enumerate(fed) if draft < 0 or draft != says[i]), len(fed))
        tokens.append(says + [0] * (num_speculative_tokens + 1 - len(says)))
        counts.append(1 + same)
    return tokens, counts


def gather_outcomes(
    slots: Tensor,
    num_sampled: Tensor,
    num_rejected: Tensor,
    last_sampled: Tensor,
    total_length: Tensor,
    temperature: Tensor,
    certain: Tensor,
) -> tuple[list[int], list[int], list[int], list[int], list[int], list[float]]:
    sampled, rejected, where = num_sampled.tolist(), num_rejected.tolist(), slots.tolist()
    return (
        where,
        [count - 1 for count in sampled],
        [count + left - 1 for count, left in zip(sampled, rejected, strict=True)],
        [int(last_sampled[slot, 0]) for slot in where],
        [int(total_length[slot]) for slot in where],
        [0.0 if certain[slot] else float(temperature[slot]) for slot in where],
    )


def book_drafts(
    drafts: Tensor,
    depth: Tensor,
    slots: Tensor,
    accepted: Tensor,
    most: Tensor,
    last_token: int,
    tokens: Tensor,
    ready: Tensor,
    counts: Tensor,
) -> None:
    for row, slot in enumerate(slots.tolist()):
        allowed, has_token = int(most[slot]), int(accepted[row]) >= 0
        real = min(int(depth[row]), allowed) if has_token else 0
        for j, draft in enumerate(drafts[row].tolist()):
            tokens[row, j] = min(max(draft, 0), last_token)
        ready[slot] = real
        if not has_token:
            counts[3] += 1
        elif real:
            counts[0] += 1
        else:
            counts[1 if allowed else 2] += 1


def copy_rows(source: Tensor, rows: Tensor) -> tuple[list[object]]:
    return ([source[row].tolist() for row in rows.tolist()],)


def copy_branches(source: Tensor, cells: Tensor, branch: Tensor) -> tuple[list[object]]:
    return ([source[cell, :, n].tolist() for cell, n in zip(cells.tolist(), branch.tolist(), strict=True)],)
