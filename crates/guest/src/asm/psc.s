# Page state changes: a batch of pages in the GHCB's page state change layout, or one page by hypercall, or a request that must be refused.
#
# A list is u16 cur_entry, u16 end_entry, u32 0, u64 entry[253]; an entry is cur_page[11:0], gfn[51:12] (so a GPA in place),
# op[55:52] (1 private, 2 shared), pagesize[56]. The host moves cur_entry on; past end_entry the list is done.
# A private page is rescinded before it turns shared and validated after it turned private: each private page of a batch, as the
# state table has it, is rescinded before the request and validated after it. That holds for a request that failed half way, too.
#
# While a batch is made: rbp = the list, rbx = how many entries it has.

.Lguest_page_states:
    push rbx
    push rbp
    mov rbp, [r13 + {p_psc}]
    add rbp, r15
    xor ebx, ebx
    mov edi, 16
    call .Lguest_below
    cmp eax, 1
    jb .Lguest_bad_request              # 1 in 16
    je .Lguest_one_by_hypercall         # 1 in 16, where there are hypercalls
    cmp eax, 13
    jae .Lguest_block                   # 3 in 16
    cmp eax, 7
    jae .Lguest_consecutive             # 6 in 16, else pages at random

.Lguest_scattered:
    call .Lguest_batch_size
    push rax
3:  mov rdi, [r13 + {p_pages}]
    call .Lguest_below
    mov rdi, rax
    call .Lguest_add
    dec qword ptr [rsp]
    jnz 3b
    pop rax
    jmp .Lguest_send

.Lguest_consecutive:
    call .Lguest_batch_size
    push rax
    mov rdi, [r13 + {p_pages}]
    call .Lguest_below
    push rax
3:  mov rdi, [rsp]
    cmp rdi, [r13 + {p_pages}]
    jae 4f
    call .Lguest_add
    inc qword ptr [rsp]
    dec qword ptr [rsp + 8]
    jnz 3b
4:  pop rax
    pop rax
    jmp .Lguest_send

# A 2 MiB block: its pages are brought into the state of its first page. When all are there already, the block turns as one entry.
.Lguest_block:
    mov rdi, [r13 + {p_pages}]
    shr rdi, 9
    jz .Lguest_scattered                # there is no whole block
    call .Lguest_below
    shl rax, 9
    push rax                            # [rsp + 8] = the block's first page
    push 512                            # [rsp] = pages of the block that are still to be looked at
3:  mov rcx, [rsp]
    test ecx, ecx
    jz 5f
    call .Lguest_states
    add rax, [rsp + 8]
    lea rdi, [rax + 512]
    sub rdi, rcx
    mov al, [rax]
    repe scasb                          # one instruction, so quick to emulate
    je 5f
    mov [rsp], rcx                      # those behind the one that differs
    mov rdi, [rsp + 8]
    add rdi, 511
    sub rdi, rcx
    call .Lguest_add
    cmp ebx, {max_entries}
    jb 3b
5:  pop rax
    pop rdi
    test ebx, ebx
    jz .Lguest_large

# The batch is complete: rescind, ask, note what was done, validate.
.Lguest_send:
    call .Lguest_header
    mov esi, {op_rescind}
    call .Lguest_pvalidate_batch
    mov esi, {bell_psc}
    mov rdx, [r13 + {p_psc}]
    call .Lguest_submit
    inc qword ptr [r14 + {r_psc_calls}]
.Lguest_sent:                           # rax = result
    test rax, rax
    jz 3f
    call .Lguest_error
    inc qword ptr [r14 + {r_psc_errors}]
3:  call .Lguest_commit
    mov esi, {op_validate}
    call .Lguest_pvalidate_batch
.Lguest_psc_out:
    pop rbp
    pop rbx
    ret

# One page by KVM_HC_MAP_GPA_RANGE(gpa, pages, flags: bit 4 = private).
.Lguest_one_by_hypercall:
    test qword ptr [r13 + {p_features}], {f_hypercall}
    jz .Lguest_scattered
    mov rdi, [r13 + {p_pages}]
    call .Lguest_below
    mov rdi, rax
    push rdi
    call .Lguest_add
    call .Lguest_header
    mov esi, {op_rescind}
    call .Lguest_pvalidate_batch
    call .Lguest_states
    pop rdx
    movzx r8d, byte ptr [rax + rdx]
    and r8d, {shared}                   # bit 1 is set when the page is shared now, so asks to be private
    shl r8d, 3
    shl rdx, 12
    add rdx, [r13 + {p_work}]
    mov esi, {hc_map_gpa_range}
    mov ecx, 1
    call .Lguest_hypercall
    inc qword ptr [r14 + {r_hypercalls}]
    test rax, rax
    jnz .Lguest_sent
    mov word ptr [rbp], 1               # what a doorbell would have done to the list
    jmp .Lguest_sent

# rax = size of a batch: mostly 1 to 8, 1 in 16 times anything up to a full one, 1 in 64 times full.
.Lguest_batch_size:
    mov edi, 64
    call .Lguest_below
    mov edi, {max_entries}
    cmp eax, 1
    jb 4f
    cmp eax, 5
    jb 3f
    mov edi, 8
3:  call .Lguest_below
    inc rax
    ret
4:  mov eax, edi
    ret

# Adds page rdi to the batch with the other state than it has; a page that is in the batch already is left out.
.Lguest_add:
    call .Lguest_states
    add rax, rdi
    movzx ecx, byte ptr [rax]
    test cl, {mark}
    jnz 3f
    or byte ptr [rax], {mark}
    mov edx, 3
    sub edx, ecx
    shl rdx, 52
    shl rdi, 12
    add rdi, [r13 + {p_work}]
    or rdx, rdi
    mov [rbp + rbx*8 + 8], rdx
    inc ebx
3:  ret

.Lguest_header:                         # entries 0 to rbx - 1, none done
    lea eax, [rbx - 1]
    shl eax, 16
    mov [rbp], rax
    add [r14 + {r_psc_entries}], rbx
    ret

# rax = page of entry rcx of the batch, or carry clear when that is no page of ours. Spoils rdx.
.Lguest_page_of:
    mov rax, [rbp + rcx*8 + 8]
    shl rax, 12                         # off with op and size
    shr rax, 24
    mov rdx, [r13 + {p_work}]
    shr rdx, 12
    sub rax, rdx
    cmp rax, [r13 + {p_pages}]
    ret

# Takes the marks off, and turns the states of the entries before cur_entry.
.Lguest_commit:
    push 0
3:  mov rcx, [rsp]
    call .Lguest_page_of
    jae 5f
    mov rsi, rax
    call .Lguest_states
    add rsi, rax
    movzx eax, byte ptr [rsi]
    and eax, {mark} - 1
    movzx edx, word ptr [rbp]
    cmp [rsp], rdx
    jae 4f
    xor eax, 3                          # 1 and 2 change places
4:  mov [rsi], al
5:  inc qword ptr [rsp]
    cmp [rsp], rbx
    jb 3b
    pop rax
    ret

# A whole 2 MiB block changes state by one entry. rdi = its first page; its pages are all in one state.
.Lguest_large:
    mov rbx, rdi
    call .Lguest_states
    movzx eax, byte ptr [rax + rbx]
    and eax, {mark} - 1
    push rax                            # [rsp] = the old state
    mov edx, 3 + 16                     # op = the other state, pagesize = 1
    sub edx, eax
    shl rdx, 52
    mov rcx, rbx
    shl rcx, 12
    add rcx, [r13 + {p_work}]
    or rdx, rcx
    mov [rbp + 8], rdx
    mov qword ptr [rbp], 0
    cmp eax, {private}
    jne 3f
    mov esi, {op_rescind}
    call .Lguest_pvalidate_block
3:  mov esi, {bell_psc}
    mov rdx, [r13 + {p_psc}]
    call .Lguest_submit
    inc qword ptr [r14 + {r_psc_calls}]
    inc qword ptr [r14 + {r_psc_entries}]
    inc qword ptr [r14 + {r_psc_large}]
    mov ecx, 512                        # how many pages changed
    test rax, rax
    jz 5f
    call .Lguest_error
    inc qword ptr [r14 + {r_psc_errors}]
    mov ecx, 512
    cmp word ptr [rbp], 0
    jne 5f
    mov eax, [rbp + 8]                  # as far as cur_page says
    and eax, 0xfff
    cmp eax, ecx
    cmovb ecx, eax
5:  call .Lguest_states
    lea rdi, [rax + rbx]
    pop rax
    xor eax, 3
    push rcx
    rep stosb
    pop rcx
    cmp ecx, 512
    jne 6f                              # left half way: page by page
    cmp eax, {private}
    jne .Lguest_psc_out
    mov esi, {op_validate}
    call .Lguest_pvalidate_block
    jmp .Lguest_psc_out
6:  mov esi, {op_validate}
    call .Lguest_pvalidate_pages
    jmp .Lguest_psc_out

# A request that the host must refuse with the code the GHCB specification gives, changing nothing.
.Lguest_bad_request:
    mov edi, 4
    call .Lguest_below
    push rax
    mov rdi, [r13 + {p_pages}]
    call .Lguest_below
    shl rax, 12
    add rax, [r13 + {p_work}]
    mov rdx, {op_shared} << 52
    or rdx, rax                         # a 4 KiB entry that would be good
    xor ecx, ecx                        # a header for one entry
    mov rbx, {bad_entry}
    pop rax
    cmp eax, 1
    jb 3f
    je 4f
    cmp eax, 2
    je 5f
    mov ecx, {max_entries} << 16        # header: end_entry one past the last that exists
    mov rbx, {bad_header}
    jmp 6f
3:  or rdx, 2                           # entry: cur_page beyond a 4 KiB page
    jmp 6f
4:  or rdx, 0x1000                      # entry: 2 MiB that does not begin on 2 MiB
    jmp 7f
5:  or rdx, 0x201                       # entry: cur_page beyond a 2 MiB page
7:  mov rax, 1 << 56
    or rdx, rax
6:  mov [rbp], rcx
    mov [rbp + 8], rdx
    push rcx
    push rdx
    mov rsi, [r13 + {p_doorbell}]
    add rsi, {bell_psc}
    mov rdx, [r13 + {p_psc}]
    call .Lguest_write
    mov rsi, [r13 + {p_doorbell}]
    add rsi, {bell_psc} + 8
    call .Lguest_read
    inc qword ptr [r14 + {r_psc_calls}]
    pop rdx
    pop rcx
    cmp rax, rbx
    jne 8f
    mov eax, {err_list_changed}
    cmp [rbp], rcx
    jne 8f
    cmp [rbp + 8], rdx
    jne 8f
    inc qword ptr [r14 + {r_psc_refused}]
    jmp .Lguest_psc_out
8:  inc qword ptr [r14 + {r_psc_wrong_answers}]
    call .Lguest_error
    jmp .Lguest_psc_out
