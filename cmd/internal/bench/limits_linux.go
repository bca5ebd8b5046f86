package main

import "golang.org/x/sys/unix"

// wantedFiles is how many files a process of the bench may need to hold: two
// for each idle connection.
const wantedFiles = 2 * maxConns

// fileLimit is how many files this process may open, and those it starts.
func fileLimit() uint64 {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return wantedFiles
	}
	return limit.Max
}

// raiseFileLimit lets this process and those that it starts hold as many files
// as they may need, or as it may allow. Who needs more will say so.
func raiseFileLimit() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return
	}
	wanted := limit
	wanted.Cur, wanted.Max = max(limit.Cur, wantedFiles), max(limit.Max, wantedFiles)
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &wanted) == nil {
		return
	}
	limit.Cur = limit.Max // Only root may raise that.
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
}
