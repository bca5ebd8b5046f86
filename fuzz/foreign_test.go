package fuzz

//lint:file-ignore SA1019 net/http's own HTTP/2 keeps goroutines and channels that a synctest bubble cannot have; x/net's judges us here

import (
	"io"
	"log"
	"net"
	"net/http"

	"golang.org/x/net/http2"
)

// A foreign is how x/net's ends are set up.
type foreign struct {
	frame                 uint32 // SETTINGS_MAX_FRAME_SIZE
	streamWindow, allOver int32  // of a server: a stream's window, and the connection's
}

// serve serves a connection to its end. Without ConfigureServer all servers
// would share a pool of channels, which bubbles cannot.
func (f foreign) serve(nc net.Conn, handler http.HandlerFunc) {
	base := &http.Server{ErrorLog: log.New(io.Discard, "", 0)}
	server := &http2.Server{MaxReadFrameSize: f.frame, MaxUploadBufferPerStream: f.streamWindow, MaxUploadBufferPerConnection: f.allOver, MaxConcurrentStreams: 200}
	if err := http2.ConfigureServer(base, server); err != nil {
		panic(err)
	}
	server.ServeConn(nc, &http2.ServeConnOpts{Handler: handler, BaseConfig: base})
}

// A requester is a client's end of a connection.
type requester interface {
	RoundTrip(*http.Request) (*http.Response, error)
	Close() error
}

func (f foreign) client(nc net.Conn) (requester, error) {
	return (&http2.Transport{AllowHTTP: true, DisableCompression: true, MaxReadFrameSize: f.frame}).NewClientConn(nc)
}
