package control

import (
	"context"
	"crypto/ed25519"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// caller is who a call comes from: the node that its token names.
type caller struct {
	node    string
	expires time.Time
	remote  string
}

// authenticate returns the caller, or an error with code Unauthenticated that
// says what is wrong with the token.
func (s *Server) authenticate(ctx context.Context) (caller, error) {
	who := caller{remote: "?"}
	if p, ok := peer.FromContext(ctx); ok {
		who.remote = p.Addr.String()
		if host, _, err := net.SplitHostPort(who.remote); err == nil {
			who.remote = host
		}
	}
	refuse := func(reason string) (caller, error) {
		s.log.Warn("caller refused", "remote", who.remote, "reason", reason)
		return caller{}, status.Error(codes.Unauthenticated, reason)
	}
	values := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(values) != 1 {
		return refuse("exactly one authorization header is needed")
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return refuse("the authorization header holds no bearer token")
	}
	key := s.trust.Load().tokenKey.Public().(ed25519.PublicKey)
	node, expires, err := verifyToken(key, strings.TrimSpace(token), s.cfg.Now())
	if err != nil {
		return refuse(err.Error())
	}
	who.node, who.expires = node, expires
	return who, nil
}
